/* SPDX-License-Identifier: Apache-2.0 */
/*
 * TCP connections on channels, the same at both ends of the wire: the side
 * that accepted one asks the other to dial its own loopback. Stream 0 is what
 * the accepting side sends.
 */
#ifndef LAB_RELAY_H
#define LAB_RELAY_H

#include "mux.h"

#include <netinet/in.h>
#include <poll.h>

struct relay {
    int fd;
    uint32_t chan;
    bool connecting, aborted;
    struct src src;
    struct dst dst;
    struct relay *next;
};

struct relays {
    struct link *link;
    struct relay *first;
};

/* A non-blocking TCP socket, and the loopback address to use it with. */
int loopback_socket(uint16_t port, struct sockaddr_in *addr);
short poll_revents(const struct pollfd *fds, size_t n, int fd);

/* Takes fd over. */
void relays_add(struct relays *rs, int fd, uint32_t chan, bool accepted);
/* Dials the loopback; OPENED or FAIL will be sent. mark: SO_MARK, or 0. */
void relays_dial(struct relays *rs, uint32_t chan, uint16_t port, int mark);
void relays_frame(struct relays *rs, const struct frame *f, const char *data);
size_t relays_count(const struct relays *rs);
/* Fills at most relays_count() entries; returns how many. */
size_t relays_poll(const struct relays *rs, struct pollfd *fds);
void relays_turn(struct relays *rs, const struct pollfd *fds, size_t n);

#endif
