/* Which frame is for whom, given what the connection is doing. */
#include <errno.h>

#include "agent.h"

static void request(struct conn *conn, uint8_t type, uint32_t version, struct reader *reader)
{
    if (conn->state != CONN_IDLE) {
        conn_protocol_error(conn, "request while another runs");
        return;
    }
    if (version != PROTOCOL_VERSION) {
        conn_error(conn, EPROTONOSUPPORT, "protocol version");
        conn->closing = 1;
        return;
    }
    if (type == REQ_EXEC)
        exec_request(conn, reader);
    else if (type >= REQ_FILE_READ && type <= REQ_SET_ATTR)
        file_request(conn, type, reader);
    else if (type >= REQ_PING && type <= REQ_RENEW)
        control_request(conn, type, reader);
    else
        conn_protocol_error(conn, "unknown request");
}

/* Frames about a command that has just ended cross its EXIT on the way: an idle connection drops them. */
void handle_frame(struct conn *conn, uint8_t type, uint32_t arg, uint8_t *payload, size_t size)
{
    struct reader reader = {payload, payload + size, 0};
    if (type < MSG_DATA) {
        request(conn, type, arg, &reader);
        return;
    }
    uint32_t number;
    uint16_t rows, columns;
    switch (type) {
    case MSG_DATA:
        if (conn->state == CONN_EXEC)
            exec_data(conn, payload, size);
        else if (conn->state == CONN_WRITE)
            file_data(conn, payload, size);
        return;
    case MSG_END:
        if (conn->state == CONN_EXEC)
            exec_end(conn);
        else if (conn->state == CONN_WRITE)
            file_end(conn);
        return;
    case MSG_WINDOW:
    case MSG_SIGNAL:
        number = get_u32(&reader);
        if (reader.bad)
            break;
        if (conn->state == CONN_EXEC && type == MSG_WINDOW)
            exec_window(conn, arg, number);
        else if (conn->state == CONN_EXEC)
            exec_signal(conn, number);
        return;
    case MSG_RESIZE:
        rows = get_u16(&reader);
        columns = get_u16(&reader);
        if (reader.bad)
            break;
        if (conn->state == CONN_EXEC)
            exec_resize(conn, rows, columns);
        return;
    }
    conn_protocol_error(conn, "malformed frame");
}
