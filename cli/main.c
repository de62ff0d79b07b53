/* srf: the program. Finds the command; everything else is in cmd_<name>.c. */
#include "cli/cli.h"

#include <hdf5.h>
#include <signal.h>
#include <string.h>

#include "kernels/numeric.h"

static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
#define X(name, summary) {#name, summary, cmd_##name},
    SRF_COMMAND_LIST(X)
#undef X
};

static void usage(FILE *to)
{
    fputs("usage: srf COMMAND [options]\n\n"
          "Turns pretrained softmax language models into recurrent ones.\n\n",
          to);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(to, "  %-9s %s\n", commands[i].name, commands[i].summary);
    fputs("\n'srf COMMAND --help' explains a command.\n", to);
}

int main(int argc, char **argv)
{
    srf_flush_subnormals();
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is an I/O error like another */
    /* Every file is closed when main returns. What HDF5 does beyond that at exit is to complain on
     * stderr about what a broken file made it lose. */
    H5dont_atexit();
    if (argc < 2) {
        usage(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        usage(stdout);
        return EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("srf " SRF_VERSION);
        return EXIT_OK;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[1], commands[i].name) != 0) continue;
        int code = commands[i].run(argc - 1, argv + 1);
        /* Results that could not be written are a failure, not a success. */
        if ((fflush(stdout) != 0 || ferror(stdout)) && code == EXIT_OK) {
            fputs("srf: error: standard output could not be written\n", stderr);
            code = EXIT_FAILED;
        }
        return code;
    }
    return cli_usage_error("unknown command '%s': see 'srf --help'", argv[1]);
}
