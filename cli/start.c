/* Before main, and before the libraries start.
 *
 * OpenBLAS takes 128 MB of addresses for each thread when it is loaded. Where a limit (ulimit -v)
 * denies them it asks again, for ever, and no line of ours is ever reached. So a clock runs until
 * main, if there is such a limit: what takes a second of the processor's time to load is that. */
#include "cli/cli.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

static void set_clock(int seconds)
{
    const struct itimerval clock = {.it_value.tv_sec = seconds};
    setitimer(ITIMER_PROF, &clock, NULL);
}

/* A standard stream that was closed (2>&-) would be the first file that is opened: what is printed
 * would go into an output. In its place comes what cannot be read or written, as it could not. */
static void fill_closed(void)
{
    for (int fd = 0; fd <= STDERR_FILENO; fd++) {
        if (fcntl(fd, F_GETFD) >= 0) continue;
        int got = open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
        (void)got; /* the lowest that is free: fd */
    }
}

void cli_started(void)
{
    set_clock(0);
    signal(SIGPROF, SIG_DFL);
    fill_closed();
}

/* A sanitizer is not ready for this, and lives with no such limit anyway. */
#if defined(__ELF__) && !defined(__SANITIZE_ADDRESS__)

static void on_clock(int sig)
{
    static const char words[] =
        "srf: error: the limit on address space (ulimit -v) is too low for OpenBLAS to start: it "
        "takes 128 MB a thread; raise it, or set OMP_NUM_THREADS=1\n";
    (void)sig;
    ssize_t n = write(STDERR_FILENO, words, sizeof words - 1);
    (void)n;
    _exit(EXIT_FAILED);
}

static void before_libraries(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
    signal(SIGPROF, on_clock);
    set_clock(1);
}

__attribute__((section(".preinit_array"),
               used)) static void (*const first)(void) = before_libraries;

#endif
