/* Users and groups by /etc/passwd and /etc/group: the library's lookups would bring in name services. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { DATABASE_MAX = 1 << 20 };

static char *load(const char *path)
{
    char *text = malloc(DATABASE_MAX);
    if (!text)
        return NULL;
    if (read_small_file(path, text, DATABASE_MAX) < 0)
        text[0] = 0;
    return text;
}

/* Splits the next line at its colons, in place. Returns the number of fields, 0 at the end. */
static int next_record(char **text, char **fields, int wanted)
{
    char *line = *text;
    if (!line || !*line)
        return 0;
    char *end = strchr(line, '\n');
    if (end)
        *end = 0;
    *text = end ? end + 1 : NULL;
    int count = 0;
    while (line && count < wanted) {
        fields[count++] = line;
        line = strchr(line, ':');
        if (line)
            *line++ = 0;
    }
    return count;
}

static int number(const char *text, uint32_t *value)
{
    char *end;
    if (*text < '0' || *text > '9')
        return 0;
    unsigned long parsed = strtoul(text, &end, 10);
    if (*end || parsed >= UINT32_MAX)
        return 0;
    *value = (uint32_t)parsed;
    return 1;
}

static int find_in_passwd(const char *wanted, struct user *user)
{
    uint32_t uid, wanted_uid = 0;
    int by_number = number(wanted, &wanted_uid), found = 0;
    char *text = load("/etc/passwd"), *at = text, *fields[7];
    for (int count; !found && (count = next_record(&at, fields, 7));) {
        uint32_t gid;
        if (count < 6 || !number(fields[2], &uid) || !number(fields[3], &gid))
            continue;
        if (by_number ? uid != wanted_uid : strcmp(fields[0], wanted) != 0)
            continue;
        found = 1;
        user->uid = uid;
        user->gid = gid;
        snprintf(user->name, sizeof user->name, "%s", fields[0]);
        snprintf(user->home, sizeof user->home, "%s", fields[5]);
    }
    free(text);
    if (!found && by_number) {
        user->uid = wanted_uid; /* a number needs no entry */
        found = 1;
    }
    return found;
}

static int has_member(char *members, const char *name)
{
    for (char *member = strtok(members, ","); member; member = strtok(NULL, ","))
        if (strcmp(member, name) == 0)
            return 1;
    return 0;
}

static int find_in_group(const char *wanted, struct user *user)
{
    int found = 0;
    char *text = load("/etc/group"), *at = text, *fields[4];
    for (int count; (count = next_record(&at, fields, 4));) {
        uint32_t gid;
        if (count < 3 || !number(fields[2], &gid))
            continue;
        if (wanted) {
            if (strcmp(fields[0], wanted) == 0) {
                user->gid = gid;
                found = 1;
                break;
            }
        } else if (count == 4 && user->name[0] && gid != user->gid && has_member(fields[3], user->name) &&
                   user->group_count < sizeof user->groups / sizeof user->groups[0]) {
            user->groups[user->group_count++] = gid;
        }
    }
    free(text);
    return found;
}

int user_find(const char *text, struct user *user)
{
    char name[128];
    size_t length = strcspn(text, ":");
    if (length == 0 || length >= sizeof name)
        return EINVAL;
    memcpy(name, text, length);
    name[length] = 0;
    memset(user, 0, sizeof *user);
    if (!find_in_passwd(name, user))
        return ENOENT;
    user->groups[user->group_count++] = user->gid;
    if (!text[length]) {
        find_in_group(NULL, user);
        return 0;
    }
    const char *group = text + length + 1;
    uint32_t gid;
    if (number(group, &gid))
        user->gid = gid;
    else if (!find_in_group(group, user))
        return ENOENT;
    user->groups[0] = user->gid;
    return 0;
}
