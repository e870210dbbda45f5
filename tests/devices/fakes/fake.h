/* What the stand-ins for a GPU's driver and for NCCL share. */
#include <stdatomic.h>
#include <stddef.h>

/* Counted in a file that the test reads while the process runs, and after it was killed (FAKE_COUNTS). */
struct counts {
    atomic_long bytes;         /* of the GPU's memory that are taken */
    atomic_long streams;       /* that are there */
    atomic_long events;        /* that are there */
    atomic_long communicators; /* that are there */
    atomic_long sent;          /* pieces that went over all communicators */
    atomic_long received;      /* pieces that came */
    atomic_long aborted;       /* communicators that were ended */
    atomic_long pinned;        /* pieces of the host's memory that the GPU may use by itself */
};
struct counts *fake_counts(void);

/* Has `work` done on a stream, after what was put there before. */
void fake_enqueue(void *stream, void (*work)(void *), void *argument);
