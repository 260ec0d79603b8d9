/* SPDX-License-Identifier: Apache-2.0 */
/* The ELF kernel inside a Linux bzImage. See unpack_kernel.c. */
#ifndef SM_UNPACK_KERNEL_H
#define SM_UNPACK_KERNEL_H

#include <stddef.h>

/*
 * Decompress the payload of the x86 bzImage file `bzimage` into the file
 * `out`, which appears whole (rename) or not at all; an existing file is
 * replaced. Returns 0, or -errno with one line in err: -ENOEXEC when the
 * input is no such kernel, -EBADMSG when its payload is damaged, -EFBIG when
 * it is absurdly large, or what the file system said.
 */
int sm_unpack_kernel(const char *bzimage, const char *out, char *err,
                     size_t errlen);

#endif
