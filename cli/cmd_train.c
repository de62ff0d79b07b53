#include "cli/training.h"

int cmd_train(int argc, char **argv)
{
    struct cli_training defaults = {
        .name = "train",
        .usage = "srf train --model M.h5 | --init CONFIG.json --data D.h5 --out DIR [options]",
        .about = "Train a model with the attention it has (softmax from scratch). Writes\n"
                 "DIR/metrics.jsonl, DIR/last.h5 (to resume from), DIR/model.h5 and\n"
                 "DIR/training.html (its curves).",
        .config = srf_train_defaults(),
    };
    return cli_training(argc, argv, &defaults);
}
