"""Turn the lines of `bible -f gen1:1-rev22:21` (stdin) into out/text/{train,heldout}.txt.

A line is 'Ge1:1 In the beginning ...'. The references go; the verses of a chapter are joined into
one document of running prose; '<|endoftext|>' separates documents. Every 16th chapter is held out.
The output depends on the input only.
"""

import pathlib
import re
import sys

SEPARATOR = "<|endoftext|>"
HELD_OUT_EVERY = 16
LINE = re.compile(r"(\S+?)(\d+):\d+ (.+)")
CHAPTERS = 1189  # of the King James Bible: a short or garbled input is refused


def read_chapters(lines):
    chapters = []
    last = None
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line.rstrip())
        if not match:
            sys.exit(f"make_text.py: line {number}: expected 'BookC:V text', found {line[:60]!r}")
        book, chapter, verse = match.groups()
        if (book, chapter) != last:
            chapters.append([])
            last = (book, chapter)
        chapters[-1].append(verse)
    return [" ".join(verses) for verses in chapters]


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: bible -f gen1:1-rev22:21 | make_text.py OUT_FOLDER")
    out = pathlib.Path(sys.argv[1])
    chapters = read_chapters(sys.stdin)
    if len(chapters) != CHAPTERS:
        sys.exit(f"make_text.py: expected {CHAPTERS} chapters, found {len(chapters)}")
    # The middle one of each 16: the last chapters of the short books stay in the training part.
    first = HELD_OUT_EVERY // 2
    held_out = chapters[first::HELD_OUT_EVERY]
    train = [text for i, text in enumerate(chapters) if i % HELD_OUT_EVERY != first]
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("heldout", held_out)):
        path = out / f"{name}.txt"
        path.write_text(f"\n{SEPARATOR}\n".join(documents) + "\n", encoding="utf-8")
        print(f"    {path}: {len(documents)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
