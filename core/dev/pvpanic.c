/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's panic notice; see pvpanic.h. */
#include "dev/pvpanic.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

struct sm_pvpanic {
    struct sm_device dev;
    void (*panicked)(void *arg, bool handled);
    void *arg;
};

static struct sm_pvpanic *pvpanic_of(struct sm_device *dev)
{
    return (struct sm_pvpanic *)((char *)dev - offsetof(struct sm_pvpanic, dev));
}

static uint64_t pvpanic_read(void *dev, uint64_t off, unsigned len)
{
    (void)dev, (void)off, (void)len;
    return SM_PVPANIC_PANICKED | SM_PVPANIC_CRASH_LOADED;
}

static void pvpanic_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_pvpanic *p = dev;

    (void)off, (void)len;
    if (value & SM_PVPANIC_PANICKED)
        p->panicked(p->arg, false);
    else if (value & SM_PVPANIC_CRASH_LOADED)
        p->panicked(p->arg, true);
}

const struct sm_bus_ops sm_pvpanic_bus_ops = { pvpanic_read, pvpanic_write };

static void pvpanic_reset(struct sm_device *dev)
{
    (void)dev;
}

static int pvpanic_save(struct sm_device *dev, struct sm_state_writer *w)
{
    (void)dev;
    sm_state_begin(w, "pvpanic", 1);
    sm_state_end(w);
    return w->error;
}

static int pvpanic_load(struct sm_device *dev, struct sm_state_reader *r)
{
    (void)dev;
    if (sm_state_open(r, "pvpanic") != 1)
        return -EBADMSG;
    sm_state_close(r);
    return r->error;
}

static void pvpanic_destroy(struct sm_device *dev)
{
    free(pvpanic_of(dev));
}

static const struct sm_device_ops pvpanic_ops = {
    .type = "pvpanic",
    .reset = pvpanic_reset,
    .save = pvpanic_save,
    .load = pvpanic_load,
    .destroy = pvpanic_destroy,
};

int sm_pvpanic_create(void (*panicked)(void *arg, bool handled), void *arg,
                      struct sm_pvpanic **out)
{
    struct sm_pvpanic *p = calloc(1, sizeof(*p));

    if (!p)
        return -ENOMEM;
    p->dev.ops = &pvpanic_ops;
    strcpy(p->dev.name, "pvpanic");
    p->panicked = panicked;
    p->arg = arg;
    *out = p;
    return 0;
}

struct sm_device *sm_pvpanic_device(struct sm_pvpanic *p)
{
    return &p->dev;
}
