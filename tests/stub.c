/* A CUDA driver that runs nothing, remembers the last launch, and agrees to everything Triton's launcher asks of it. */
#include <stdint.h>
#include <string.h>

typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } Config;

Config last_config;
uint64_t last_pointers[8]; /* the first arguments, which are pointers */
int launches;

int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

/* An H100: shared memory, multiprocessors, threads and all else that is asked for fits into 227 KiB. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uintptr_t pointer) { memcpy(data, &pointer, 8); return 0; }

int cuLaunchKernelEx(const Config *config, void *function, void **arguments, void **extra) {
  last_config = *config;
  for (int i = 0; i < 8; i++) memcpy(&last_pointers[i], arguments[i], 8);
  launches++;
  return 0;
}
