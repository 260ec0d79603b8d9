/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writer of an EROFS metadata image (Linux fs/erofs/erofs_fs.h): uncompressed,
 * 4 KiB blocks, no device table, mountable from Linux 5.4 and with DAX.
 *
 *   0        1024      1152                        data_start
 *   | zeros  | super   | inodes, xattrs, tails | directory blocks | pad | data...
 *
 * Every inode is extended (64 bytes), so owners, times and sizes are exact.
 * Small directories and symbolic links are inline behind their inode; files are
 * FLAT_PLAIN runs of blocks in the layers' data blobs, which follow the image
 * on the device: block = (meta bytes + earlier layers' bytes + offset) / 4096.
 *
 * The output depends on the tree alone: order by name, no clock, zero UUID.
 */
#ifndef SM_IMAGE_EROFS_H
#define SM_IMAGE_EROFS_H

#include "tree.h"

/*
 * Writes the image of t into fd from offset 0. layer_bytes are the lengths of
 * the data blobs in device order (multiples of a block); an inode's `layer`
 * chooses one. *meta_bytes is a multiple of 2 MiB, *inodes the inodes written.
 */
int sm_erofs_write(const struct sm_tree *t, const uint64_t *layer_bytes, uint32_t layers,
                   int fd, uint64_t *meta_bytes, uint32_t *inodes, struct sm_image_error *e);

#endif
