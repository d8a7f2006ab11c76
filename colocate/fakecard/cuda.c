/* As much of CUDA's driver API as a load and its guards need, for processes that share a fake card: contexts, kernels,
 * memory; and checkpointing, by which another process is locked, taken off the card, brought back and unlocked. It fails
 * by the file `faults` as libnvidia-ml.so.1 does.
 *
 * A kernel here is its first parameter, a 64-bit number: so many nanoseconds on the whole card. One context a process,
 * one stream; whoever is locked waits in its next call. What a launch does to a real card, client.py does alike.
 * As measured on driver 580 (benchmarks/gpu): a lock returns when all that was launched has finished, and the lock of a
 * frozen process does not return before that is thawed, whatever time-out it was given.
 * Structures and numbers: cuda.h of CUDA 13.
 */
#include "state.h"
#include <errno.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

enum {
  CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_CONTEXT = 201, CUDA_ERROR_LAUNCH_FAILED = 719, CUDA_ERROR_NOT_SUPPORTED = 801
};

int cuInit(unsigned int flags) {
  (void)flags;
  int code = fault(__func__);
  return code ? code : attach() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

int cuCheckpointProcessGetState(int pid, int *state) {
  return ask(__func__, VERB_STATE, pid, 0, state);
}

struct lock_args { unsigned int timeout_ms, reserved; uint64_t more[7]; };
int cuCheckpointProcessLock(int pid, struct lock_args *args) {
  return ask(__func__, VERB_LOCK, pid, args ? args->timeout_ms : 0, NULL);
}
int cuCheckpointProcessCheckpoint(int pid, void *args) {
  (void)args;
  return ask(__func__, VERB_CHECKPOINT, pid, 0, NULL);
}
int cuCheckpointProcessRestore(int pid, void *args) {
  (void)args;
  return ask(__func__, VERB_RESTORE, pid, 0, NULL);
}
int cuCheckpointProcessUnlock(int pid, void *args) {
  (void)args;
  return ask(__func__, VERB_UNLOCK, pid, 0, NULL);
}

/* This process's context: a ring of launches that the daemon reads (shared.py). */
#define HEADER 64
#define SLOTS 1024
struct launch { uint64_t ns; uint32_t kernels, graph; };
static struct {
  int link;
  unsigned char *ring;
  uint64_t head, depth, launch_ns;
} context = {-1, NULL, 0, 0, 0};
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static uint64_t word(int offset) { return *(volatile uint64_t *)(context.ring + offset); }
static uint64_t number_in(const char *text, const char *name) {
  const char *found = strstr(text, name);
  return found ? strtoull(found + strlen(name), NULL, 10) : 0;
}

/* A question to the daemon and its answer; nonzero where the card is gone. */
static int talk(const char *question, char *answer, size_t size) {
  if (send(context.link, question, strlen(question), MSG_NOSIGNAL) < 0) return -1;
  ssize_t got;
  while ((got = recv(context.link, answer, size - 1, 0)) < 0 && errno == EINTR) {}
  if (got <= 0) return -1;
  answer[got] = 0;
  return 0;
}

static int wait_for(uint64_t launches) {
  char question[64], answer[512];
  snprintf(question, sizeof question, "{\"wait\": %llu}", (unsigned long long)launches);
  if (talk(question, answer, sizeof answer) || word(16)) return CUDA_ERROR_LAUNCH_FAILED;
  return CUDA_SUCCESS;
}

int cuDeviceGetCount(int *count) {
  if (!shared) return NOT_INITIALIZED;
  *count = (int)shared->device_count;
  return CUDA_SUCCESS;
}
int cuDeviceGet(int *device, int ordinal) {
  if (!shared) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= (int)shared->device_count) return CUDA_ERROR_INVALID_VALUE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
  const char *text = shared->devices[device].uuid + strlen("GPU-");
  for (int i = 0; i < 16; text += 2, i++) {
    if (*text == '-') text++;
    unsigned int byte = 0;
    sscanf(text, "%2x", &byte);
    uuid[i] = (unsigned char)byte;
  }
  return CUDA_SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 16 ? 132 : 0; /* MULTIPROCESSOR_COUNT */
  return CUDA_SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **made, int device) {
  int code = fault(__func__);
  if (code) return code;
  *made = &context;
  if (context.ring) return CUDA_SUCCESS;
  struct sockaddr_un where = {.sun_family = AF_UNIX};
  if (snprintf(where.sun_path, sizeof where.sun_path, "%s/socket", folder) >= (int)sizeof where.sun_path)
    return CUDA_ERROR_NO_DEVICE;
  int memory = memfd_create("fakecard", MFD_CLOEXEC);
  size_t size = HEADER + SLOTS * sizeof(struct launch);
  context.link = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (memory < 0 || ftruncate(memory, (off_t)size) || connect(context.link, (struct sockaddr *)&where, sizeof where))
    return CUDA_ERROR_NO_DEVICE;
  context.ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  char said[64], room[CMSG_SPACE(sizeof(int))] = {0}, answer[512];
  int length = snprintf(said, sizeof said, "{\"open\": %d}", device);
  struct iovec part = {said, (size_t)length};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  struct cmsghdr *passed = CMSG_FIRSTHDR(&message);
  passed->cmsg_level = SOL_SOCKET, passed->cmsg_type = SCM_RIGHTS, passed->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(passed), &memory, sizeof memory);
  ssize_t sent = sendmsg(context.link, &message, MSG_NOSIGNAL);
  close(memory);
  ssize_t got = sent < 0 ? -1 : recv(context.link, answer, sizeof answer - 1, 0);
  if (got <= 0) return CUDA_ERROR_NO_DEVICE;
  answer[got] = 0;
  context.depth = number_in(answer, "\"depth\": "), context.launch_ns = number_in(answer, "\"launch_ns\": ");
  return CUDA_SUCCESS;
}
int cuCtxSetCurrent(void *wanted) { return wanted == &context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)image;
  return image ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)name;
  *function = module;
  return CUDA_SUCCESS;
}
int cuStreamCreate(void **stream, unsigned int flags) {
  (void)flags;
  *stream = &context;
  return CUDA_SUCCESS;
}

int cuLaunchKernel(void *function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
                   unsigned int bz, unsigned int bytes, void *stream, void **parameters, void **extra) {
  (void)function, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)bytes, (void)stream, (void)extra;
  if (!context.ring) return CUDA_ERROR_INVALID_CONTEXT;
  pthread_mutex_lock(&turn);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  uint64_t due = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec + context.launch_ns;
  int code = word(16) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
  char answer[512];
  if (!code && word(24) && talk("{\"unlocked\": true}", answer, sizeof answer)) code = CUDA_ERROR_LAUNCH_FAILED;
  if (!code && context.head - word(8) >= context.depth) code = wait_for(context.head - context.depth + context.depth / 16);
  if (!code) {
    struct launch *slot = (struct launch *)(context.ring + HEADER) + context.head % SLOTS;
    *slot = (struct launch){*(uint64_t *)parameters[0], 1, 0};
    __sync_synchronize();
    *(volatile uint64_t *)context.ring = ++context.head;
    do clock_gettime(CLOCK_MONOTONIC, &now); /* what a launch costs */
    while ((uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec < due);
  }
  pthread_mutex_unlock(&turn);
  return code;
}
int cuStreamSynchronize(void *stream) {
  (void)stream;
  if (!context.ring) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context.head) return CUDA_SUCCESS;
  char question[64], answer[512];
  pthread_mutex_lock(&turn);
  snprintf(question, sizeof question, "{\"wait\": %llu}", (unsigned long long)context.head);
  int code = send(context.link, question, strlen(question), MSG_NOSIGNAL) < 0 ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
  while (!code && word(8) < context.head && !word(16) && !word(24)) {} /* it spins, CUDA's default */
  if (!code && (recv(context.link, answer, sizeof answer, 0) <= 0 || word(16))) code = CUDA_ERROR_LAUNCH_FAILED;
  pthread_mutex_unlock(&turn);
  return code;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (!context.ring) return CUDA_ERROR_INVALID_CONTEXT;
  char question[64], answer[512];
  pthread_mutex_lock(&turn);
  snprintf(question, sizeof question, "{\"malloc\": %llu}", (unsigned long long)size);
  int gone = talk(question, answer, sizeof answer);
  pthread_mutex_unlock(&turn);
  if (gone) return CUDA_ERROR_LAUNCH_FAILED;
  *address = size; /* so that it is known when it is freed */
  return strstr(answer, "true") ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
int cuMemFree_v2(uint64_t address) {
  if (!context.ring) return CUDA_ERROR_INVALID_CONTEXT;
  char question[64], answer[512];
  pthread_mutex_lock(&turn);
  snprintf(question, sizeof question, "{\"free\": %llu}", (unsigned long long)address);
  int gone = talk(question, answer, sizeof answer);
  pthread_mutex_unlock(&turn);
  return gone ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
