/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-vsock (VIRTIO 1.2, 5.10) in user space, streams only, with
 * Firecracker's convention on the host's side:
 *   guest → host, port P   a connection to the unix socket `<path>_P`
 *   host → guest           connect to `<path>`, say "CONNECT <port>\n", read
 *                          "OK <host port>\n", then it is the stream
 * virtio_vsock.c has the theory of operation.
 */
#ifndef SM_VIRTIO_VSOCK_H
#define SM_VIRTIO_VSOCK_H

#include "dev/virtio.h"
#include "dev/virtio_mmio.h"

#define SM_VSOCK_HOST_CID 2
#define SM_VSOCK_CONNS 1024             /* most connections of a device */
#define SM_VSOCK_BUF_BYTES (256u << 10) /* most bytes held for a slow reader */

struct sm_vsock_config {
    uint64_t guest_cid; /* 3 … 2^32-2 */
    const char *path;   /* made with mode 0600, unlinked at the end */
};

/* -ENAMETOOLONG: path (with "_" and ten digits) does not fit a sockaddr_un;
 * -EADDRINUSE: somebody listens there. */
int sm_virtio_vsock_create(const struct sm_virtio_env *env,
                           const struct sm_vsock_config *cfg,
                           struct sm_virtio_mmio **out);

/*
 * Faults on demand, from the owner's thread. RESET: every stream, or those of
 * a port (0: all; the guest's or the host's), ends with a RST on one side and
 * a closed socket on the other; returns how many. STALL: nothing moves, until
 * GO.
 */
enum sm_vsock_fault { SM_VSOCK_FAULT_RESET, SM_VSOCK_FAULT_STALL, SM_VSOCK_FAULT_GO };
int sm_virtio_vsock_fault(struct sm_virtio_mmio *dev, enum sm_vsock_fault what, uint32_t port);

#endif
