#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

double cli_now(void)
{
    return srf__now();
}

void cli_spread(const double *x, int64_t n, double *mean, double *sd)
{
    double squares = 0;
    *mean = 0;
    for (int64_t i = 0; i < n; i++) *mean += x[i] / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (x[i] - *mean) * (x[i] - *mean);
    *sd = sqrt(squares / (double)(n - 1));
}

int cli_fail(void)
{
    fprintf(stderr, "srf: error: %s\n", srf_error_message());
    if (getenv("SRF_TRACE")) fprintf(stderr, "srf: at %s\n", srf_error_trace());
    return EXIT_FAILED;
}

int cli_usage_error(const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *s = text; *s; s++)
        if ((unsigned char)*s < 32) *s = '?';
    fprintf(stderr, "srf: error: %s\n", text);
    return EXIT_USAGE;
}

static void print_help(const char *usage, const char *about, const struct cli_option *options)
{
    printf("usage: %s\n\n%s\n\n", usage, about);
    for (const struct cli_option *o = options; o->name; o++) {
        char left[64];
        if (o->short_name)
            snprintf(left, sizeof left, "-%c, --%s%s%s", o->short_name, o->name,
                     o->metavar ? " " : "", o->metavar ? o->metavar : "");
        else
            snprintf(left, sizeof left, "    --%s%s%s", o->name, o->metavar ? " " : "",
                     o->metavar ? o->metavar : "");
        printf("  %-28s %s\n", left, o->help);
    }
    printf("  %-28s %s\n", "    --help", "show this");
}

/* Store a value; a whole number or nothing: "12x", "", "1e99" for an int are errors. */
static int store(const struct cli_option *o, const char *text)
{
    char *end;
    errno = 0;
    double x = 0;
    switch (o->type) {
    case CLI_FLAG:
        *(bool *)o->dest = true;
        return EXIT_OK;
    case CLI_STRING:
        *(const char **)o->dest = text;
        return EXIT_OK;
    case CLI_STRINGS: {
        struct cli_strings *list = o->dest;
        int most = sizeof list->text / sizeof *list->text;
        if (list->n == most)
            return cli_usage_error("--%s: given more than %d times", o->name, most);
        list->text[list->n++] = text;
        return EXIT_OK;
    }
    case CLI_INT: {
        long long v = strtoll(text, &end, 10);
        if (end == text || *end || errno)
            return cli_usage_error("--%s: expected a whole number, found '%s'", o->name, text);
        *(int64_t *)o->dest = v;
        x = (double)v;
        break;
    }
    case CLI_U64: {
        unsigned long long v = strtoull(text, &end, 0);
        if (end == text || *end || errno || strchr(text, '-'))
            return cli_usage_error("--%s: expected a whole number >= 0, found '%s'", o->name, text);
        *(uint64_t *)o->dest = v;
        return EXIT_OK;
    }
    case CLI_DOUBLE:
        x = strtod(text, &end);
        if (end == text || *end || errno || !isfinite(x))
            return cli_usage_error("--%s: expected a number, found '%s'", o->name, text);
        *(double *)o->dest = x;
        break;
    }
    if (o->min < o->max && !(x >= o->min && x <= o->max))
        return cli_usage_error("--%s: %s is outside %g to %g", o->name, text, o->min, o->max);
    return EXIT_OK;
}

static const struct cli_option *find(const struct cli_option *options, const char *name, size_t n)
{
    for (const struct cli_option *o = options; o->name; o++)
        if (strlen(o->name) == n && strncmp(o->name, name, n) == 0) return o;
    return NULL;
}

bool cli_parse(int argc, char **argv, const char *usage, const char *about,
               const struct cli_option *options, const char **positional, int min_positional,
               int max_positional, int *n_positional, bool *set, int *exit_code)
{
    int n = 0;
    bool only_positional = false;
    *exit_code = EXIT_USAGE;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (only_positional || arg[0] != '-' || arg[1] == '\0') {
            if (n == max_positional) {
                cli_usage_error("unexpected argument '%s'; usage: %s", arg, usage);
                return false;
            }
            positional[n++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            only_positional = true;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(usage, about, options);
            *exit_code = EXIT_OK;
            return false;
        }
        const struct cli_option *o = NULL;
        const char *value = NULL;
        if (arg[1] == '-') {
            const char *eq = strchr(arg, '=');
            o = find(options, arg + 2, eq ? (size_t)(eq - arg - 2) : strlen(arg + 2));
            if (eq) value = eq + 1;
        } else if (arg[2] == '\0') {
            for (const struct cli_option *p = options; p->name && !o; p++)
                if (p->short_name == arg[1]) o = p;
        }
        if (!o || (value && o->type == CLI_FLAG)) {
            cli_usage_error("unknown option '%s'; see 'srf %s --help'", arg, argv[0]);
            return false;
        }
        if (o->type != CLI_FLAG && !value) {
            if (i + 1 == argc) {
                cli_usage_error("%s needs a value (%s)", arg, o->metavar);
                return false;
            }
            value = argv[++i];
        }
        if (store(o, value) != EXIT_OK) return false;
        if (set) set[o - options] = true;
    }
    if (n < min_positional) {
        cli_usage_error("missing argument; usage: %s", usage);
        return false;
    }
    if (n_positional) *n_positional = n;
    *exit_code = EXIT_OK;
    return true;
}

void cli_progress_start(struct cli_progress *p, const char *what, bool quiet)
{
    *p = (struct cli_progress){.what = what, .start = cli_now(), .quiet = quiet};
    p->terminal = isatty(STDERR_FILENO);
    p->every_s = p->terminal ? 0.2 : 10;
    p->last = p->terminal ? 0 : p->start;
}

void cli_progress_update(struct cli_progress *p, double done, double total, const char *note)
{
    double t = cli_now();
    if (p->quiet || t - p->last < p->every_s) return;
    p->last = t;
    double elapsed = t - p->start, left = done > 0 ? elapsed * (total - done) / done : 0;
    fprintf(stderr, "%s%s ", p->terminal ? "\r\033[K" : "", p->what);
    if (total > 0)
        fprintf(stderr, "%5.1f%%  %d:%02d left  ", 100 * done / total, (int)left / 60,
                (int)left % 60);
    fprintf(stderr, "%s%s", note ? note : "", p->terminal ? "" : "\n");
    fflush(stderr);
}

void cli_progress_end(struct cli_progress *p)
{
    if (!p->quiet && p->terminal) fputs("\r\033[K", stderr);
}
