/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plain tar's header checksums put right, or hardly an input of a fuzzer would
 * get past them. Anything else stays as it is.
 */
#ifndef SM_SPEC_TAR_FIX_H
#define SM_SPEC_TAR_FIX_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static inline void tar_fix_checksums(uint8_t *p, size_t size)
{
    size_t at = 0;

    if (size < 512 || memcmp(p + 257, "ustar", 5))
        return;
    while (size - at >= 512) {
        uint8_t *h = p + at;
        unsigned sum = 0;
        unsigned long long length = 0;

        for (int i = 0; i < 11 && h[124 + i] >= '0' && h[124 + i] <= '7'; i++)
            length = length * 8 + (h[124 + i] - '0');
        memset(h + 148, ' ', 8);
        for (int i = 0; i < 512; i++)
            sum += h[i];
        if (sum != 8 * ' ')
            snprintf((char *)h + 148, 8, "%06o", sum & 0777777);
        else
            memset(h + 148, 0, 8); /* the end */
        length = (length + 511) / 512 * 512;
        at += 512;
        if (length > size - at)
            break;
        at += (size_t)length;
    }
}

#endif
