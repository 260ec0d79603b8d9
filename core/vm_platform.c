/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine around the vCPUs: what every VM has (power, pvpanic, the clock), where
 * the devices that its owner adds lie, with which interrupt, and the ACPI tables that
 * tell the guest of them.
 *
 *   ports    the platform's devices, the serial port
 *   GSI      4 the serial port, 8 kept free, 9 ACPI's events, the others from 5 on in
 *            the order of the devices
 *   MMIO     virtio devices, one slot each from SM_VIRTIO_MMIO_BASE
 */
#include <errno.h>
#include <sys/random.h>

#include "acpi.h"
#include "boot.h"
#include "dev/power.h"
#include "dev/pvpanic.h"
#include "dev/rtc.h"
#include "dev/serial.h"
#include "dev/virtio_mmio.h"
#include "vm_impl.h"

#define QUEUE_NOTIFY_OFF 0x50 /* virtio 1.2, 4.2.2: QueueNotify */
#define IOAPIC_PINS 24

/* --- what every machine has ---------------------------------------------- */

static void on_power(void *arg, bool off, const char *how)
{
    sm_vm_stop(arg, off ? SM_STOP_POWEROFF : SM_STOP_REBOOT, how);
}

static void on_panic(void *arg, bool handled)
{
    struct sm_vm *vm = arg;

    if (handled)
        sm_events_notice(&vm->events, "pvpanic", "guest panicked into its crash kernel", 0);
    else
        sm_vm_stop(vm, SM_STOP_PANIC, "told by pvpanic");
}

static int add_ports(struct sm_vm *vm, uint64_t base, uint64_t count,
                     const struct sm_bus_ops *ops, void *dev)
{
    return sm_bus_add(&vm->bus, SM_SPACE_PIO, base, count, ops, dev);
}

static int add_power(struct sm_vm *vm)
{
    struct sm_power *power;
    int err = sm_power_create(on_power, vm, &power);

    if (!err)
        err = sm_vm_add_device(vm, sm_power_device(power));
    if (!err)
        err = add_ports(vm, SM_POWER_PORT, SM_POWER_PORTS, &sm_power_acpi_ops, power);
    if (!err)
        err = add_ports(vm, SM_POWER_CF9, 1, &sm_power_cf9_ops, power);
    if (!err)
        err = add_ports(vm, SM_POWER_KBD_DATA, 5, &sm_power_kbd_ops, power);
    return err;
}

static int add_pvpanic(struct sm_vm *vm)
{
    struct sm_pvpanic *pvpanic;
    int err = sm_pvpanic_create(on_panic, vm, &pvpanic);

    if (!err)
        err = sm_vm_add_device(vm, sm_pvpanic_device(pvpanic));
    return err ? err : add_ports(vm, SM_PVPANIC_PORT, 1, &sm_pvpanic_bus_ops, pvpanic);
}

static int add_rtc(struct sm_vm *vm)
{
    struct sm_rtc *rtc;
    int err = sm_rtc_create(&rtc);

    if (!err)
        err = sm_vm_add_device(vm, sm_rtc_device(rtc));
    return err ? err : add_ports(vm, SM_RTC_PORT, SM_RTC_PORTS, &sm_rtc_bus_ops, rtc);
}

int sm_vm_add_platform(struct sm_vm *vm)
{
    int err = add_power(vm);

    if (!err)
        err = add_pvpanic(vm);
    return err ? err : add_rtc(vm);
}

/* --- what its owner adds -------------------------------------------------- */

static uint32_t gsi_after(uint32_t gsi)
{
    gsi++;
    while (gsi == 8 || gsi == SM_GED_GSI) /* the RTC's by custom, the event device's */
        gsi++;
    return gsi;
}

int sm_vm_next_irq(struct sm_vm *vm, struct sm_irq *irq)
{
    int err;

    irq->fd = -1;
    if (vm->next_gsi >= IOAPIC_PINS)
        return -ENOSPC;
    err = sm_irq_open(irq, vm->hv, vm->next_gsi);
    if (err)
        return err;
    irq->trace = &vm->trace;
    vm->last_gsi = vm->next_gsi;
    vm->next_gsi = gsi_after(vm->next_gsi);
    return 0;
}

int sm_vm_add_virtio(struct sm_vm *vm, struct sm_virtio_mmio *dev)
{
    struct sm_virtio_slot *slot = &vm->virtio[vm->virtio_count];
    int err;

    if (vm->virtio_count == SM_VIRTIO_MMIO_MAX) {
        sm_virtio_mmio_device(dev)->ops->destroy(sm_virtio_mmio_device(dev));
        return -ENOSPC;
    }
    err = sm_vm_add_device(vm, sm_virtio_mmio_device(dev));
    if (err)
        return err;
    slot->dev = dev;
    slot->gsi = vm->last_gsi;
    slot->gpa = SM_VIRTIO_MMIO_BASE + vm->virtio_count * SM_VIRTIO_MMIO_STRIDE;
    err = sm_bus_add(&vm->bus, SM_SPACE_MMIO, slot->gpa, SM_VIRTIO_MMIO_STRIDE,
                     &sm_virtio_mmio_bus_ops, dev);
    if (!err)
        vm->virtio_count++;
    return err;
}

int sm_vm_add_serial(struct sm_vm *vm)
{
    struct sm_serial *serial;
    struct sm_irq irq;
    int err;

    if (vm->has_serial)
        return -EEXIST;
    err = sm_irq_open(&irq, vm->hv, SM_SERIAL_GSI);
    irq.trace = &vm->trace;
    if (!err)
        err = sm_serial_create(&vm->console, &irq, &serial);
    if (!err)
        err = sm_vm_add_device(vm, sm_serial_device(serial));
    if (!err)
        err = add_ports(vm, SM_SERIAL_PORT, SM_SERIAL_PORTS, &sm_serial_bus_ops, serial);
    if (err)
        return err;
    sm_console_log_set_input(&vm->console, sm_serial_input, serial);
    vm->has_serial = true;
    return 0;
}

/* --- before it starts ----------------------------------------------------- */

int sm_vm_write_acpi(struct sm_vm *vm)
{
    struct sm_acpi_config cfg = {
        .cpus = vm->cpus,
        .serial = vm->has_serial,
        .pvpanic = true,
        .vmgenid_gpa = SM_BOOT_VMGENID_GPA,
        .ged_gsi = SM_GED_GSI,
        .virtio_count = vm->virtio_count,
    };
    uint8_t *tables = sm_mem_ptr(&vm->mem, SM_BOOT_ACPI_GPA, SM_BOOT_ACPI_BYTES);
    uint8_t *vmgenid = sm_mem_ptr(&vm->mem, SM_BOOT_VMGENID_GPA, 16);
    size_t len;

    if (!tables || !vmgenid)
        return -EFAULT;
    for (unsigned i = 0; i < vm->virtio_count; i++) {
        cfg.virtio[i].gpa = vm->virtio[i].gpa;
        cfg.virtio[i].len_bytes = SM_VIRTIO_MMIO_STRIDE;
        cfg.virtio[i].gsi = vm->virtio[i].gsi;
    }
    if (getrandom(vmgenid, 16, 0) != 16)
        return -EIO;
    return sm_acpi_build(&cfg, SM_BOOT_ACPI_GPA, tables, SM_BOOT_ACPI_BYTES, &len);
}

int sm_vm_add_ioeventfds(struct sm_vm *vm)
{
    for (unsigned i = 0; i < vm->virtio_count; i++) {
        const struct sm_virtio_slot *slot = &vm->virtio[i];

        for (unsigned q = 0; q < sm_virtio_mmio_queues(slot->dev); q++) {
            int err = sm_hv_ioeventfd(vm->hv, slot->gpa + QUEUE_NOTIFY_OFF, 4, q,
                                      sm_virtio_mmio_queue_fd(slot->dev, q), true);
            if (err)
                return err == -ENOTSUP ? 0 : err;
        }
    }
    return 0;
}
