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

static int unknown_command(const char *word)
{
    struct cli_nearest near;
    cli_nearest_start(&near, word, strlen(word));
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        cli_nearest_offer(&near, commands[i].name);
    if (near.name)
        return cli_usage_error("unknown command '%s': did you mean %s? See 'srf --help'", word,
                               near.name);
    return cli_usage_error("unknown command '%s': see 'srf --help'", word);
}

/* argv[0] is the command's name. */
static int run_command(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[0], commands[i].name) != 0) continue;
        int code = commands[i].run(argc, argv);
        /* Results that could not be written are a failure, not a success. */
        if ((fflush(stdout) != 0 || ferror(stdout)) && code == EXIT_OK) {
            fputs("srf: error: standard output could not be written\n", stderr);
            code = EXIT_FAILED;
        }
        return code;
    }
    return unknown_command(argv[0]);
}

int main(int argc, char **argv)
{
    cli_started();
    srf_flush_subnormals();
    /* A closed pipe and a limit on the size of files are I/O errors like others. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    /* Every file is closed when main returns. What HDF5 does beyond that at exit is to complain on
     * stderr about what a broken file made it lose. */
    H5dont_atexit();
    if (argc < 2) {
        usage(stderr);
        return EXIT_USAGE;
    }
    bool help = strcmp(argv[1], "help") == 0;
    if (help && argc == 3) return run_command(2, (char *[]){argv[2], "--help", NULL});
    if (help || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        usage(stdout);
        return EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("srf " SRF_VERSION);
        return EXIT_OK;
    }
    return run_command(argc - 1, argv + 1);
}
