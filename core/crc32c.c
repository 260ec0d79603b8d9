/* SPDX-License-Identifier: Apache-2.0 */
/* CRC-32C; see crc32c.h. By the CPU's instruction where there is one, else half
 * a byte at a time, with a table small enough to be made on the spot. */
#include "crc32c.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

#define POLYNOMIAL 0x82f63b78u /* reflected */

static uint32_t by_hand(uint32_t crc, const uint8_t *p, size_t len)
{
    uint32_t table[16];

    for (uint32_t i = 0; i < 16; i++) {
        table[i] = i;
        for (int bit = 0; bit < 4; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? POLYNOMIAL : 0);
    }
    for (; len; len--) {
        crc ^= *p++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_cpu(uint32_t crc, const uint8_t *p, size_t len)
{
    uint64_t wide = crc, word;

    for (; len >= 8; len -= 8, p += 8) {
        memcpy(&word, p, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    crc = (uint32_t)wide;
    for (; len; len--)
        crc = _mm_crc32_u8(crc, *p++);
    return crc;
}
#endif

uint32_t sm_crc32c(uint32_t crc, const void *p, size_t len)
{
    crc = ~crc;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~by_cpu(crc, p, len);
#endif
    return ~by_hand(crc, p, len);
}

uint32_t sm_sum_add(uint32_t sum, uint64_t number, const void *p, size_t len)
{
    uint8_t le[8];

    for (unsigned i = 0; i < 8; i++)
        le[i] = (uint8_t)(number >> (8 * i));
    return sm_crc32c(sm_crc32c(sum, le, sizeof(le)), p, len);
}
