"""Train a byte-level BPE tokenizer with GPT-2's pre-tokenizer: make_tokenizer.py TEXT OUT.json.

<|endoftext|> is id 0, the 256 bytes follow, then the merges. Needs the package `tokenizers`.
"""

import sys

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ModuleNotFoundError as missing:
    sys.exit(f"make_tokenizer.py: needs {missing.name}: pip install {missing.name}")

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: make_tokenizer.py TEXT OUT.json")
    text, out = sys.argv[1:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    content = open(text, encoding="utf-8").read()
    # Without the separators: the trainer would spend merges on their pieces.
    tokenizer.train_from_iterator(content.split(END_OF_TEXT), trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(out, pretty=False)
    count = len(tokenizer.encode(content).ids)
    print(f"    {out}: vocabulary {VOCABULARY}, {count} tokens in {text}")


if __name__ == "__main__":
    main()
