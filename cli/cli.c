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

enum {
    HELP_LEFT = 31, /* the column that an option's text begins at */
    HELP_WIDTH = 96,
};

/* One option, and its text in lines as long as HELP_WIDTH allows. */
static void print_option(const char *left, const char *text)
{
    printf("  %-*s ", HELP_LEFT - 3, left);
    int room = HELP_WIDTH - HELP_LEFT, long_name = (int)strlen(left) - (HELP_LEFT - 3);
    for (int first = room - (long_name > 0 ? long_name : 0);; first = room) {
        int n = (int)strlen(text);
        if (n > first) {
            for (n = first; n > 0 && text[n] != ' '; n--) continue;
            if (n == 0) n = (int)strcspn(text, " ");
        }
        printf("%.*s\n", n, text);
        text += n;
        if (!*text) return;
        text++;
        printf("%*s", HELP_LEFT, "");
    }
}

static void print_help(const char *usage, const char *about, const struct cli_option *options)
{
    printf("usage: %s\n\n%s\n\n", usage, about);
    for (const struct cli_option *o = options; o->name; o++) {
        char left[64];
        if (o->type == CLI_HEADING) {
            printf("%s%s\n", o == options ? "" : "\n", o->help);
            continue;
        }
        if (o->short_name)
            snprintf(left, sizeof left, "-%c, --%s%s%s", o->short_name, o->name,
                     o->metavar ? " " : "", o->metavar ? o->metavar : "");
        else
            snprintf(left, sizeof left, "    --%s%s%s", o->name, o->metavar ? " " : "",
                     o->metavar ? o->metavar : "");
        print_option(left, o->help);
    }
    print_option("    --help", "show this");
}

/* Store a value; a whole number or nothing: "12x", "", "1e99" for an int are errors. */
static int store(const struct cli_option *o, const char *text)
{
    char *end;
    errno = 0;
    double x = 0;
    switch (o->type) {
    case CLI_HEADING: /* has no name to be given by */
        return EXIT_OK;
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
        return cli_usage_error("--%s: %s is outside %.9g to %.9g", o->name, text, o->min, o->max);
    return EXIT_OK;
}

static const struct cli_option *find(const struct cli_option *options, const char *name, size_t n)
{
    for (const struct cli_option *o = options; o->name; o++)
        if (n > 0 && strlen(o->name) == n && strncmp(o->name, name, n) == 0) return o;
    return NULL;
}

/* Insertions, removals, changes and swaps of neighbours between two words; NEAR_MOST for words that
 * are too long or too far apart to be meant for each other. */
enum { NEAR_MOST = 3, NEAR_LENGTH = 24 };

static int distance(const char *a, size_t na, const char *b)
{
    int rows[3][NEAR_LENGTH + 1], *two = rows[0], *one = rows[1], *now = rows[2];
    size_t nb = strlen(b);
    if (na > NEAR_LENGTH || nb > NEAR_LENGTH) return NEAR_MOST;
    for (size_t j = 0; j <= nb; j++) one[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        now[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int best = one[j - 1] + (a[i - 1] != b[j - 1]);
            if (one[j] + 1 < best) best = one[j] + 1;
            if (now[j - 1] + 1 < best) best = now[j - 1] + 1;
            bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped && two[j - 2] + 1 < best) best = two[j - 2] + 1;
            now[j] = best;
        }
        int *last = two;
        two = one, one = now, now = last;
    }
    return one[nb] < NEAR_MOST ? one[nb] : NEAR_MOST;
}

void cli_nearest_start(struct cli_nearest *near, const char *word, size_t n)
{
    *near = (struct cli_nearest){.word = word, .n = n, .distance = NEAR_MOST};
}

void cli_nearest_offer(struct cli_nearest *near, const char *name)
{
    /* Of a short word half is not enough to know it by. The start of a longer name is. */
    int d = distance(near->word, near->n, name);
    if ((size_t)d * 3 > near->n + 1) d = NEAR_MOST;
    if (near->n > 2 && strncmp(near->word, name, near->n) == 0) d = 1;
    if (d >= near->distance) return;
    near->distance = d;
    near->name = name;
}

static void unknown_option(const char *arg, const char *command, const struct cli_option *options)
{
    const char *word = arg + strspn(arg, "-");
    struct cli_nearest near;
    cli_nearest_start(&near, word, strcspn(word, "="));
    for (const struct cli_option *o = options; o->name; o++)
        if (o->type != CLI_HEADING) cli_nearest_offer(&near, o->name);
    if (near.name)
        cli_usage_error("unknown option '%s': did you mean --%s? See 'srf %s --help'", arg,
                        near.name, command);
    else
        cli_usage_error("unknown option '%s': see 'srf %s --help'", arg, command);
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
        if (!o) {
            unknown_option(arg, argv[0], options);
            return false;
        }
        if (value && o->type == CLI_FLAG) {
            cli_usage_error("--%s takes no value, found '%s'", o->name, value);
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
    if (total > 0) fprintf(stderr, "%5.1f%%  ", 100 * done / total);
    if (done > 0 && total > 0 && left < 3600)
        fprintf(stderr, "%d:%02d left  ", (int)left / 60, (int)left % 60);
    else if (done > 0 && total > 0 && left < 1e8)
        fprintf(stderr, "%d:%02d:%02d left  ", (int)left / 3600, (int)left / 60 % 60,
                (int)left % 60);
    fprintf(stderr, "%s%s", note ? note : "", p->terminal ? "" : "\n");
    fflush(stderr);
}

void cli_progress_end(struct cli_progress *p)
{
    if (!p->quiet && p->terminal) fputs("\r\033[K", stderr);
}
