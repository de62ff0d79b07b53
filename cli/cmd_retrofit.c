#include "cli/training.h"

int cmd_retrofit(int argc, char **argv)
{
    struct cli_training defaults = {
        .name = "retrofit",
        .usage = "srf retrofit --model M.h5 --data D.h5 --out DIR [options]",
        .about =
            "Swap softmax attention for SRF attention and fine-tune: the main job. By default\n"
            "the window hybrid (exact attention nearby, random features for all before), taught\n"
            "by the softmax model it came from; --window 0 is pure SRF. Writes\n"
            "DIR/metrics.jsonl, DIR/last.h5 (to resume from) and DIR/model.h5.",
        .config = srf_train_defaults(),
        .swap = true,
        .attention = srf_attention_default(),
    };
    defaults.attention.kind = SRF_ATTN_SRF;
    defaults.attention.window = 64;
    defaults.config.redraw_every = 1;
    defaults.config.freeze_at = 0.25;
    defaults.config.kl_weight = 1;
    return cli_training(argc, argv, &defaults);
}
