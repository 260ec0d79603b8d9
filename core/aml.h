/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small AML writer: just the terms our DSDT needs.
 *
 * Terms with a length are opened with sm_aml_begin and closed with sm_aml_end,
 * which moves the body to make room for its length (PkgLength has 1 to 4
 * bytes). Overflow is latched: a writer that ran out of room stays failed and
 * writes nothing more, so callers check once, at the end.
 * Source: ACPI 6.4, chapter 20 (AML) and 6.4 (resource descriptors).
 */
#ifndef SM_AML_H
#define SM_AML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sm_aml {
    uint8_t *buf;
    size_t cap, len;
    bool overflow;
};

void sm_aml_bytes(struct sm_aml *aml, const void *p, size_t len);
void sm_aml_u8(struct sm_aml *aml, uint8_t v);
void sm_aml_u16(struct sm_aml *aml, uint16_t v);
void sm_aml_u32(struct sm_aml *aml, uint32_t v);
void sm_aml_u64(struct sm_aml *aml, uint64_t v);

/* A term whose operator is one byte, or 0x5b and one byte (op > 0xff). The
 * value goes to sm_aml_end. */
size_t sm_aml_begin(struct sm_aml *aml, unsigned op);
void sm_aml_end(struct sm_aml *aml, size_t mark);

size_t sm_aml_scope(struct sm_aml *aml, const char *path); /* "\\_SB" or a NameSeg */
size_t sm_aml_device(struct sm_aml *aml, const char *seg);
size_t sm_aml_method(struct sm_aml *aml, const char *seg, unsigned args);
/* Name(seg, …): the value is written next. */
void sm_aml_name(struct sm_aml *aml, const char *seg);
/* "\\" prefixes are kept; segments of 4 characters joined by '.'. */
void sm_aml_path(struct sm_aml *aml, const char *path);

void sm_aml_int(struct sm_aml *aml, uint64_t v);
void sm_aml_string(struct sm_aml *aml, const char *s);
/* "PNP0501" as the compressed integer. */
void sm_aml_eisaid(struct sm_aml *aml, const char *id);

/* ResourceTemplate: begin, descriptors, end. */
struct sm_aml_resources {
    size_t term, size_at;
};
struct sm_aml_resources sm_aml_resources_begin(struct sm_aml *aml);
void sm_aml_resources_end(struct sm_aml *aml, struct sm_aml_resources at);
void sm_aml_memory32(struct sm_aml *aml, uint32_t base, uint32_t len);
void sm_aml_io(struct sm_aml *aml, uint16_t base, uint8_t len);
/* Edge triggered, active high, exclusive. */
void sm_aml_interrupt(struct sm_aml *aml, uint32_t gsi);

#endif
