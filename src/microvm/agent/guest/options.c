/* The agent's own options, from the kernel command line. The kernel hands words it does not know to process 1 as
 * well, but only those without a dot: these come from /proc/cmdline. */
#include <stdlib.h>
#include <string.h>

#include "agent.h"

struct options options = {.overlay = "tmpfs", .overlay_size = "50%", .port = 1024};

static void set(char *field, size_t size, const char *value)
{
    size_t length = strlen(value);
    if (length >= size)
        length = size - 1;
    memcpy(field, value, length);
    field[length] = 0;
}

static void apply(char *word)
{
    static const char prefix[] = "microvm.";
    if (strncmp(word, prefix, sizeof prefix - 1) != 0)
        return;
    word += sizeof prefix - 1;
    char *value = strchr(word, '=');
    if (value)
        *value++ = 0;
    else
        value = "1";
#define TEXT(name)                                            \
    if (strcmp(word, #name) == 0) {                           \
        set(options.name, sizeof options.name, value);        \
        return;                                               \
    }
    TEXT(root)
    TEXT(rootfstype)
    TEXT(overlay)
    TEXT(overlay_size)
    TEXT(hostname)
#undef TEXT
    if (strcmp(word, "port") == 0)
        options.port = (uint32_t)strtoul(value, NULL, 10);
    else if (strcmp(word, "debug") == 0)
        options.debug = *value != '0';
    else if (strcmp(word, "off") == 0)
        options.off_by_reset = strcmp(value, "reset") == 0;
    else
        say("unknown option microvm.%s", word);
}

/* Splits in place at white space outside double quotes, as the kernel does, up to the ` -- ` that ends its part. */
void options_parse(char *cmdline)
{
    char *at = cmdline;
    for (;;) {
        while (*at == ' ' || *at == '\t' || *at == '\n')
            at++;
        if (!*at)
            return;
        char *word = at, *to = at;
        int quoted = 0;
        for (; *at && (quoted || (*at != ' ' && *at != '\t' && *at != '\n')); at++) {
            if (*at == '"')
                quoted = !quoted;
            else
                *to++ = *at;
        }
        if (*at)
            at++;
        *to = 0;
        if (strcmp(word, "--") == 0)
            return;
        apply(word);
    }
}

void options_read(void)
{
    static char cmdline[4096];
    if (read_small_file("/proc/cmdline", cmdline, sizeof cmdline) > 0)
        options_parse(cmdline);
}
