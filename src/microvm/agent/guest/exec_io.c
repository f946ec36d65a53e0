/* A command's data. Each stream has a window of what its receiver still takes, so none holds up another and no buffer
 * grows: the host grants output, we grant stdin, and the connection itself is always read. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"

enum { READS_MAX = 16 };

static const uint64_t END_DELAY_NS = 5000000; /* streams end just before their process does: EXIT then says both */
static const uint64_t HUNG_NS = 50000000;     /* between looks at a terminal that nobody has open */

int exec_wants_output(const struct command *command, int which)
{
    return command->conn && command->out_fd[which] >= 0 && command->window[which] > 0 && !command->hung_until_ns &&
           conn_pending(command->conn) < DATA_CHUNK;
}

static void close_output(struct command *command, int which)
{
    close(command->out_fd[which]);
    command->out_fd[which] = -1;
    if (!command->exited && !command->end_due_ns)
        command->end_due_ns = now_ns() + END_DELAY_NS;
}

/* Says that a stream has ended although its command goes on. */
void exec_send_ends(struct command *command)
{
    for (int i = 0; i < 2 && command->conn && !command->exited; i++) {
        if (command->out_fd[i] < 0 && !command->end_sent[i]) {
            command->end_sent[i] = 1;
            conn_frame(command->conn, MSG_END, (uint32_t)i + 1, "", 0);
        }
    }
}

void exec_output(struct command *command, int which)
{
    for (int reads = 0; reads < READS_MAX && exec_wants_output(command, which); reads++) {
        size_t size = DATA_CHUNK;
        if (size > command->window[which])
            size = (size_t)command->window[which];
        uint8_t *to = conn_frame_begin(command->conn, size);
        if (!to)
            return;
        ssize_t got = read(command->out_fd[which], to, size);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (got < 0 && errno == EIO && command->flags & EXEC_PTY && !command->exited) {
            /* Nobody has the terminal open. Closing it now would send SIGHUP to a command that closes its streams
             * just before it exits; and it may open the terminal again. */
            command->hung_until_ns = now_ns() + HUNG_NS;
            return;
        }
        if (got <= 0) {
            close_output(command, which);
            return;
        }
        command->window[which] -= (size_t)got;
        conn_frame_end(command->conn, MSG_DATA, (uint32_t)which + 1, (size_t)got);
        if (!command->exited && (size_t)got < size)
            return;
        if (conn_pending(command->conn) >= DATA_CHUNK / 2)
            conn_flush(command->conn);
    }
}

void exec_window(struct conn *conn, uint32_t stream, uint32_t credit)
{
    struct command *command = conn->command;
    if (!command || stream < STREAM_STDOUT || stream > STREAM_STDERR)
        return;
    command->window[stream - 1] += credit;
    if (command->exited)
        exec_finish(command);
}

static void close_stdin(struct command *command)
{
    if (command->stdin_fd >= 0)
        close(command->stdin_fd);
    command->stdin_fd = -1;
    free(command->stdin_data);
    command->stdin_data = NULL;
    command->stdin_start = command->stdin_end = 0;
}

/* A terminal's input does not end by closing anything: it ends when the end-of-file character is read. */
static void end_stdin(struct command *command)
{
    struct termios settings;
    if (command->flags & EXEC_PTY && command->stdin_fd >= 0 && tcgetattr(command->stdin_fd, &settings) == 0 &&
        settings.c_lflag & ICANON)
        (void)!write(command->stdin_fd, &settings.c_cc[VEOF], 1);
    close_stdin(command);
}

static void grant(struct command *command, size_t taken)
{
    command->stdin_taken += (uint32_t)taken;
    if (command->stdin_taken < STDIN_WINDOW / 2 || !command->conn)
        return;
    conn_frame(command->conn, MSG_WINDOW, STREAM_STDIN, &command->stdin_taken, sizeof command->stdin_taken);
    command->stdin_credit += command->stdin_taken;
    command->stdin_taken = 0;
}

/* Nobody will read what the host sends from now on. */
void exec_stdin_broken(struct command *command)
{
    close_stdin(command);
    if (command->conn && !command->stdin_ended)
        conn_frame(command->conn, MSG_END, STREAM_STDIN, "", 0);
}

/* Returns how much the command took; closes stdin when nobody will take more. */
static size_t feed(struct command *command, const uint8_t *data, size_t size)
{
    size_t done = 0;
    while (done < size && command->stdin_fd >= 0) {
        ssize_t put = write(command->stdin_fd, data + done, size - done);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && errno == EAGAIN)
            break;
        if (put < 0) {
            exec_stdin_broken(command);
            break;
        }
        done += (size_t)put;
    }
    return done;
}

void exec_data(struct conn *conn, const uint8_t *data, size_t size)
{
    struct command *command = conn->command;
    if (!command)
        return;
    if (size > command->stdin_credit || (command->stdin_ended && size)) {
        conn_protocol_error(conn, "more input than was granted");
        return;
    }
    command->stdin_credit -= (uint32_t)size;
    size_t done = command->stdin_end == command->stdin_start ? feed(command, data, size) : 0;
    if (command->stdin_fd < 0)
        return; /* nobody reads it: dropped, and never granted again */
    if (done < size) {
        if (!command->stdin_data && !(command->stdin_data = malloc(STDIN_WINDOW))) {
            close_stdin(command);
            return;
        }
        size_t held = command->stdin_end - command->stdin_start;
        memmove(command->stdin_data, command->stdin_data + command->stdin_start, held);
        memcpy(command->stdin_data + held, data + done, size - done);
        command->stdin_start = 0;
        command->stdin_end = held + size - done;
    }
    grant(command, done);
}

/* The command can take more. */
void exec_feed(struct command *command)
{
    size_t done = feed(command, command->stdin_data + command->stdin_start, command->stdin_end - command->stdin_start);
    if (command->stdin_fd < 0)
        return;
    command->stdin_start += done;
    grant(command, done);
    if (command->stdin_ended && command->stdin_start == command->stdin_end)
        end_stdin(command);
}

void exec_end(struct conn *conn)
{
    struct command *command = conn->command;
    if (!command)
        return;
    command->stdin_ended = 1;
    if (command->stdin_start == command->stdin_end)
        end_stdin(command);
}

void exec_signal(struct conn *conn, uint32_t number)
{
    struct command *command = conn->command;
    if (command && !command->exited && number > 0 && number <= 64)
        kill(-command->pid, (int)number);
}

void exec_resize(struct conn *conn, uint16_t rows, uint16_t columns)
{
    struct command *command = conn->command;
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (command && command->flags & EXEC_PTY && command->out_fd[0] >= 0)
        ioctl(command->out_fd[0], TIOCSWINSZ, &size);
}
