/* SPDX-License-Identifier: Apache-2.0 */
/* Frames into a file that tcpdump and Wireshark read (pcap, nanoseconds). */
#ifndef SM_NET_PCAP_H
#define SM_NET_PCAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sm_pcap;

/* The file is made anew. -errno. */
int sm_pcap_open(const char *path, struct sm_pcap **out);
/* Into what is open: a file, or a stream socket whose reader may be slow, at the price
 * of frames that are left out. fd is the capture's, also on failure. */
int sm_pcap_new(int fd, struct sm_pcap **out);
void sm_pcap_frame(struct sm_pcap *p, const void *frame, size_t len);
/* Written out at the end of a round. false: the disk is full, or the reader has gone. */
bool sm_pcap_flush(struct sm_pcap *p);
/* The descriptor that has to take more before all is written; -1: all is. */
int sm_pcap_waits_for(const struct sm_pcap *p);
uint64_t sm_pcap_lost(const struct sm_pcap *p); /* frames */
void sm_pcap_close(struct sm_pcap *p);

#endif
