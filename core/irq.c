/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupt lines; see irq.h. */
#include "irq.h"

#include <errno.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "backend.h"
#include "trace.h"

int sm_irq_open(struct sm_irq *irq, struct sm_hv *hv, uint32_t gsi)
{
    int err;

    irq->hv = hv;
    irq->gsi = gsi;
    irq->trace = NULL;
    irq->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (irq->fd < 0)
        return -errno;
    if (!hv)
        return 0;
    err = sm_hv_irqfd(hv, gsi, irq->fd, true);
    if (err) {
        close(irq->fd);
        irq->fd = -1;
        /* No such mechanism: raised by a call instead. */
        return err == -ENOTSUP ? 0 : err;
    }
    return 0;
}

void sm_irq_close(struct sm_irq *irq)
{
    if (irq->fd < 0)
        return;
    if (irq->hv)
        sm_hv_irqfd(irq->hv, irq->gsi, irq->fd, false);
    close(irq->fd);
    irq->fd = -1;
}

void sm_irq_raise(struct sm_irq *irq)
{
    uint64_t one = 1;

    sm_trace_irq(irq->trace, irq->gsi);
    if (irq->fd >= 0) {
        /* EAGAIN means the counter is full: the edge is pending anyway. */
        ssize_t n = write(irq->fd, &one, sizeof(one));

        (void)n;
    } else if (irq->hv) {
        sm_hv_irq_line(irq->hv, irq->gsi, true);
        sm_hv_irq_line(irq->hv, irq->gsi, false);
    }
}
