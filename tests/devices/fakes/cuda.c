/* A stand-in for libcuda.so.1: a GPU's memory is the host's, a stream is a thread that does one thing after the other.
 *
 * It is no more forgiving than a driver: what is put on a stream is done later, in the order of that stream alone; memory that is
 * given back is overwritten, and what was never written is not zero. Only what this project calls is here. */
#define _GNU_SOURCE
#include "fake.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_READY = 600 };
#define GPU_MEMORY (1L << 30)
#define GARBAGE 0xa5

struct counts *fake_counts(void) {
    static struct counts *counts;
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&once);
    if (!counts) {
        const char *path = getenv("FAKE_COUNTS");
        int file = path ? open(path, O_RDWR | O_CREAT, 0600) : -1;
        if (file >= 0 && ftruncate(file, sizeof *counts) == 0)
            counts = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (!counts || counts == MAP_FAILED)
            counts = calloc(1, sizeof *counts);
    }
    pthread_mutex_unlock(&once);
    return counts;
}

/* Streams. */
struct task { void (*work)(void *); void *argument; struct task *next; };
struct stream {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct task *first, **last;
    int busy, over;
    pthread_t thread;
};

static void *turn(void *of) {
    struct stream *stream = of;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (!stream->first && !stream->over)
            pthread_cond_wait(&stream->changed, &stream->lock);
        struct task *task = stream->first;
        if (!task)
            break;
        stream->first = task->next;
        if (!stream->first)
            stream->last = &stream->first;
        stream->busy = 1;
        pthread_mutex_unlock(&stream->lock);
        task->work(task->argument);
        free(task);
        pthread_mutex_lock(&stream->lock);
        stream->busy = 0;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    free(stream);
    return NULL;
}

int cuStreamCreate(void **made, unsigned flags) {
    (void)flags;
    struct stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    stream->last = &stream->first;
    pthread_create(&stream->thread, NULL, turn, stream);
    pthread_detach(stream->thread);
    fake_counts()->streams++;
    *made = stream;
    return SUCCESS;
}

void fake_enqueue(void *to, void (*work)(void *), void *argument) {
    struct stream *stream = to;
    struct task *task = malloc(sizeof *task);
    *task = (struct task){work, argument, NULL};
    pthread_mutex_lock(&stream->lock);
    *stream->last = task;
    stream->last = &task->next;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
}

int cuStreamSynchronize(void *of) {
    struct stream *stream = of;
    pthread_mutex_lock(&stream->lock);
    while (stream->first || stream->busy)
        pthread_cond_wait(&stream->changed, &stream->lock);
    pthread_mutex_unlock(&stream->lock);
    return SUCCESS;
}

/* As a driver does: what is on it is still done. */
int cuStreamDestroy_v2(void *of) {
    struct stream *stream = of;
    fake_counts()->streams--;
    pthread_mutex_lock(&stream->lock);
    stream->over = 1;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    return SUCCESS;
}

/* Events: how often one was recorded, and how many of these a stream has come to. */
struct event { pthread_mutex_t lock; pthread_cond_t changed; long recorded, reached; int references; };
struct mark { struct event *event; long number; };

static void let_go(struct event *event) {
    pthread_mutex_lock(&event->lock);
    int left = --event->references;
    pthread_mutex_unlock(&event->lock);
    if (!left)
        free(event);
}

int cuEventCreate(void **made, unsigned flags) {
    (void)flags;
    struct event *event = calloc(1, sizeof *event);
    pthread_mutex_init(&event->lock, NULL);
    pthread_cond_init(&event->changed, NULL);
    event->references = 1;
    fake_counts()->events++;
    *made = event;
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) {
    fake_counts()->events--;
    let_go(event);
    return SUCCESS;
}

static struct mark *mark(struct event *event, long more) {
    struct mark *mark = malloc(sizeof *mark);
    pthread_mutex_lock(&event->lock);
    event->recorded += more;
    event->references++;
    *mark = (struct mark){event, event->recorded};
    pthread_mutex_unlock(&event->lock);
    return mark;
}

static void reach(void *argument) {
    struct mark *mark = argument;
    pthread_mutex_lock(&mark->event->lock);
    if (mark->event->reached < mark->number)
        mark->event->reached = mark->number;
    pthread_cond_broadcast(&mark->event->changed);
    pthread_mutex_unlock(&mark->event->lock);
    let_go(mark->event);
    free(mark);
}

static void await(void *argument) {
    struct mark *mark = argument;
    pthread_mutex_lock(&mark->event->lock);
    while (mark->event->reached < mark->number)
        pthread_cond_wait(&mark->event->changed, &mark->event->lock);
    pthread_mutex_unlock(&mark->event->lock);
    let_go(mark->event);
    free(mark);
}

int cuEventRecord(void *event, void *stream) {
    fake_enqueue(stream, reach, mark(event, 1));
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    (void)flags;
    fake_enqueue(stream, await, mark(event, 0));
    return SUCCESS;
}

int cuEventSynchronize(void *of) {
    struct event *event = of;
    pthread_mutex_lock(&event->lock);
    while (event->reached < event->recorded)
        pthread_cond_wait(&event->changed, &event->lock);
    pthread_mutex_unlock(&event->lock);
    return SUCCESS;
}

int cuEventQuery(void *of) {
    struct event *event = of;
    pthread_mutex_lock(&event->lock);
    int done = event->reached >= event->recorded;
    pthread_mutex_unlock(&event->lock);
    return done ? SUCCESS : NOT_READY;
}

/* Memory. */
struct piece { size_t bytes; };

int cuMemAllocAsync(uint64_t *made, size_t bytes, void *stream) {
    (void)stream;
    struct counts *counts = fake_counts();
    if (counts->bytes + (long)bytes > GPU_MEMORY)
        return OUT_OF_MEMORY;
    struct piece *piece = malloc(sizeof *piece + bytes + 16);
    piece->bytes = bytes;
    memset(piece + 1, GARBAGE, bytes);
    counts->bytes += bytes;
    *made = (uint64_t)(uintptr_t)(piece + 1);
    return SUCCESS;
}

static void give_back(void *argument) {
    struct piece *piece = (struct piece *)argument - 1;
    fake_counts()->bytes -= piece->bytes;
    memset(piece + 1, GARBAGE, piece->bytes);
    free(piece);
}

int cuMemFreeAsync(uint64_t at, void *stream) {
    fake_enqueue(stream, give_back, (void *)(uintptr_t)at);
    return SUCCESS;
}

/* The host's memory, which a GPU reads and writes by itself. */
int cuMemHostAlloc(void **made, size_t bytes, unsigned flags) {
    (void)flags;
    *made = malloc(bytes);
    memset(*made, GARBAGE, bytes);
    fake_counts()->pinned++;
    return SUCCESS;
}

int cuMemFreeHost(void *at) {
    free(at);
    fake_counts()->pinned--;
    return SUCCESS;
}

struct copy { void *to; const void *from; size_t bytes; };

static void copy(void *argument) {
    struct copy *copy = argument;
    memcpy(copy->to, copy->from, copy->bytes);
    free(copy);
}

static int copies(void *to, const void *from, size_t bytes, void *stream) {
    struct copy *made = malloc(sizeof *made);
    *made = (struct copy){to, from, bytes};
    fake_enqueue(stream, copy, made);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return copies((void *)(uintptr_t)to, from, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return copies(to, (const void *)(uintptr_t)from, bytes, stream);
}

/* Devices and contexts: two GPUs, each with one context, an address. */
static int contexts[2];
static _Thread_local void *current;

int cuInit(unsigned flags) {
    (void)flags;
    return SUCCESS;
}

int cuDeviceGet(int *device, int number) {
    *device = number;
    return number < 2 ? SUCCESS : INVALID_DEVICE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)attribute, (void)device;
    *value = 1;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    current = context;
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_DEVICE ? "CUDA_ERROR_INVALID_DEVICE" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    return cuGetErrorName(error, text);
}
