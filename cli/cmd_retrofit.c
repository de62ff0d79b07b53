#include "cli/cli.h"

int cmd_retrofit(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    return cli_usage_error("retrofit: not built yet");
}
