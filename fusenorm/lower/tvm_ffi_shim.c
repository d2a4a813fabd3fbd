/* The functions of tvm-ffi that CUDA code calls. Where the process has tvm_ffi loaded, its own
   library answers: the stream is the one set there, errors become Python's. Elsewhere the stream is
   the one given by fusenorm_use_stream and an error is only kept as text. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "tvm_ffi_shim.h"

static _Thread_local int has_stream;
static _Thread_local void* stream;
static _Thread_local char message[512];

void fusenorm_use_stream(void* given) {
  stream = given;
  has_stream = 1;
}

void fusenorm_forget_stream(void) { has_stream = 0; }

const char* fusenorm_last_error(void) { return message; }

/* A function of libtvm_ffi.so, NULL unless the process has loaded it. */
static void* ffi(const char* name) {
  void* library = dlopen("libtvm_ffi.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == NULL) return NULL;
  void* found = dlsym(library, name);
  dlclose(library); /* whoever loaded it keeps it */
  return found;
}

void* TVMFFIEnvGetStream(int32_t device_type, int32_t device_id) {
  static void* (*real)(int32_t, int32_t);
  if (has_stream) return stream;
  if (real == NULL) *(void**)&real = ffi("TVMFFIEnvGetStream");
  return real != NULL ? real(device_type, device_id) : NULL;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  void (*real)(const char*, const char**, int32_t);
  *(void**)&real = ffi("TVMFFIErrorSetRaisedFromCStrParts");
  int used = snprintf(message, sizeof message, "%s: ", kind);
  for (int32_t i = 0; i < count && used < (int)sizeof message; ++i)
    used += snprintf(message + used, sizeof message - (size_t)used, "%s", parts[i]);
  if (real != NULL) real(kind, parts, count);
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* text) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1);
}

void TVMFFIErrorSetRaised(void* error) {
  void (*real)(void*);
  *(void**)&real = ffi("TVMFFIErrorSetRaised");
  snprintf(message, sizeof message, "a CUDA call failed");
  if (real != NULL) real(error);
}

/* The backtrace of an error; errors of kernels carry none. */
const void* TVMFFIBacktrace(const char* file, int line, const char* function, int whole) {
  static const struct {
    const char* data;
    size_t size;
  } empty = {"", 0};
  (void)file, (void)line, (void)function, (void)whole;
  return &empty;
}

/* Where a tensor lies, for the choice between kernels. */
uint64_t fusenorm_address_f16(const void* data) { return (uint64_t)(uintptr_t)data; }
uint64_t fusenorm_address_bf16(const void* data) { return (uint64_t)(uintptr_t)data; }
uint64_t fusenorm_address_f32(const void* data) { return (uint64_t)(uintptr_t)data; }
