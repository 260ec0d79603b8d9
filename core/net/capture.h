/* SPDX-License-Identifier: Apache-2.0 */
/* Who records the frames of a card: several at once, each begun and ended at any time. */
#ifndef SM_NET_CAPTURE_H
#define SM_NET_CAPTURE_H

#include "pcap.h"
#include "round.h"

#define SM_CAPTURES 8

struct sm_captures {
    struct sm_pcap *list[SM_CAPTURES];
    uint32_t ids[SM_CAPTURES], last_id;
    unsigned count;
};

/* The capture is the card's from then on; its id, or -ENOSPC. */
int sm_captures_add(struct sm_captures *c, struct sm_pcap *p, uint32_t *id);
/* How many frames it has left out; -ENOENT: it has ended. */
int64_t sm_captures_end(struct sm_captures *c, uint32_t id);
void sm_captures_frame(struct sm_captures *c, const void *frame, size_t len);
void sm_captures_fill(const struct sm_captures *c, struct sm_poll *poll);
/* At the end of a round; those that nobody reads any more end. */
void sm_captures_flush(struct sm_captures *c);
void sm_captures_close(struct sm_captures *c);

#endif
