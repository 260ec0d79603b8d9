/* SPDX-License-Identifier: Apache-2.0 */
/* Power off and reset; see power.h. */
#include "dev/power.h"

#include <errno.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define SLP_EN 0x20
#define SLP_TYP(value) ((value) >> 2 & 7)
#define WAK_STS 0x80
#define CF9_RESET 0x04
#define KBD_PULSE_RESET 0xfe

struct sm_power {
    struct sm_device dev;
    void (*stop)(void *arg, bool off, const char *how);
    void *arg;
    atomic_uchar status; /* sleep status register */
};

static struct sm_power *power_of(struct sm_device *dev)
{
    return (struct sm_power *)((char *)dev - offsetof(struct sm_power, dev));
}

static uint64_t acpi_read(void *dev, uint64_t off, unsigned len)
{
    struct sm_power *p = dev;

    (void)len;
    return off == SM_POWER_SLEEP_STATUS - SM_POWER_PORT ? p->status : 0;
}

static void acpi_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_power *p = dev;

    (void)len;
    switch (off + SM_POWER_PORT) {
    case SM_POWER_SLEEP_CONTROL:
        if ((value & SLP_EN) && SLP_TYP(value) == SM_POWER_S5)
            p->stop(p->arg, true, "ACPI S5");
        break;
    case SM_POWER_SLEEP_STATUS:
        p->status &= (unsigned char)~value; /* write one to clear */
        break;
    case SM_POWER_RESET:
        if (value == SM_POWER_RESET_VALUE)
            p->stop(p->arg, false, "ACPI reset register");
        break;
    }
}

static uint64_t zero_read(void *dev, uint64_t off, unsigned len)
{
    (void)dev, (void)off, (void)len;
    return 0;
}

static void cf9_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_power *p = dev;

    (void)off, (void)len;
    if (value & CF9_RESET)
        p->stop(p->arg, false, "reset port 0xcf9");
}

static void kbd_write(void *dev, uint64_t off, unsigned len, uint64_t value)
{
    struct sm_power *p = dev;

    (void)len;
    if (off == SM_POWER_KBD_COMMAND - SM_POWER_KBD_DATA &&
        (value & 0xff) == KBD_PULSE_RESET)
        p->stop(p->arg, false, "keyboard controller");
}

/* 0x60–0x64, of which 0x61 is the PC's port B: gate and speaker, all off. */
static uint64_t kbd_read(void *dev, uint64_t off, unsigned len)
{
    return zero_read(dev, off, len);
}

const struct sm_bus_ops sm_power_acpi_ops = { acpi_read, acpi_write };
const struct sm_bus_ops sm_power_cf9_ops = { zero_read, cf9_write };
const struct sm_bus_ops sm_power_kbd_ops = { kbd_read, kbd_write };

static void power_reset(struct sm_device *dev)
{
    power_of(dev)->status = 0;
}

static int power_save(struct sm_device *dev, struct sm_state_writer *w)
{
    sm_state_begin(w, "power", 1);
    sm_state_put_u8(w, power_of(dev)->status);
    sm_state_end(w);
    return w->error;
}

static int power_load(struct sm_device *dev, struct sm_state_reader *r)
{
    if (sm_state_open(r, "power") != 1)
        return -EBADMSG;
    power_of(dev)->status = sm_state_get_u8(r) & WAK_STS;
    sm_state_close(r);
    return r->error;
}

static void power_destroy(struct sm_device *dev)
{
    free(power_of(dev));
}

static const struct sm_device_ops power_ops = {
    .type = "power",
    .reset = power_reset,
    .save = power_save,
    .load = power_load,
    .destroy = power_destroy,
};

int sm_power_create(void (*stop)(void *arg, bool off, const char *how), void *arg,
                    struct sm_power **out)
{
    struct sm_power *p = calloc(1, sizeof(*p));

    if (!p)
        return -ENOMEM;
    p->dev.ops = &power_ops;
    strcpy(p->dev.name, "power");
    p->stop = stop;
    p->arg = arg;
    *out = p;
    return 0;
}

struct sm_device *sm_power_device(struct sm_power *p)
{
    return &p->dev;
}
