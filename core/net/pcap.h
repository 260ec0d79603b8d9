/* SPDX-License-Identifier: Apache-2.0 */
/* Frames into a file that tcpdump and Wireshark read (pcap, nanoseconds). */
#ifndef SM_NET_PCAP_H
#define SM_NET_PCAP_H

#include <stddef.h>
#include <stdint.h>

struct sm_pcap;

/* The file is made anew. -errno. */
int sm_pcap_open(const char *path, struct sm_pcap **out);
void sm_pcap_frame(struct sm_pcap *p, const void *frame, size_t len);
/* Written out at the end of a round; a full disk ends the capture. */
void sm_pcap_flush(struct sm_pcap *p);
uint64_t sm_pcap_lost(const struct sm_pcap *p);
void sm_pcap_close(struct sm_pcap *p);

#endif
