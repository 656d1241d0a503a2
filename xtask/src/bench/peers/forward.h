/* What the forwarder (forward.c) says to the receiver (receive.c): this head, the path, then the bytes or the second
 * path. The answer is one byte. Both ends are on one machine. */
#include <stdint.h>

enum { CREATE, TRUNCATE_OPEN, WRITE, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, LINK, SYMLINK };

struct head {
    uint32_t what, path_len;
    uint64_t at, len; /* of the bytes, or of the second path; `at` is the mode of MKDIR, the length of TRUNCATE */
};
