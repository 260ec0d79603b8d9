/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Confinement of a worker: what a guest that has broken out of the VMM's logic
 * would find. Applied once everything is open, just before the guest runs.
 *
 *   no_new_privs   no setuid program ever again
 *   limits         no core dump (it would hold the guest's memory), no locked
 *                  memory, a bounded number of descriptors
 *   landlock       no path can be opened, made, renamed or removed, no TCP
 *                  port bound or reached; the calling thread and those it
 *                  starts later (the kernel offers no more)
 *   seccomp        every thread: a list of system calls, the rest fails with
 *                  EPERM; calls that no code of ours can ever make end the
 *                  process
 *
 * Unix sockets can still be connected by path: vsock needs it.
 */
#ifndef SM_CONFINE_H
#define SM_CONFINE_H

#include "cmd.h"

/* Do what this kernel offers and say what that was. What is not offered is
 * left false; only a failure of what is offered is an error (-errno). */
int sm_confine(struct sm_confinement *done);
/* The same for sm-net, whose work is sockets: internet ones too, bound and
 * listening. files: paths stay in reach (a switch makes sockets as it goes). */
int sm_confine_network(struct sm_confinement *done, bool files);

#endif
