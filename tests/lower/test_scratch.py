"""Memory that kernels keep from call to call: ort_scratch.h by itself, in C."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from fusenorm.lower import Target
from fusenorm.lower.library import _compiler

pytestmark = pytest.mark.kernel

PROGRAM = r"""
#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "ort_scratch.h"

static void* work(void* given) {
  unsigned char mark = (unsigned char)(uintptr_t)given;
  for (size_t i = 0; i < 2000; ++i) {
    size_t bytes = 1 + i * 37 % 5000;
    char* block = take_scratch(bytes);
    memset(block, mark, bytes);
    for (size_t at = 0; at < bytes; ++at) assert((unsigned char)block[at] == mark);
    give_scratch(block);
  }
  return NULL;
}

int main(void) {
  char* first = take_scratch(100);
  assert((uintptr_t)first % LINE == 0);
  memset(first, 1, 100);
  give_scratch(first);
  assert(take_scratch(60) == first); /* the same again */
  char* other = take_scratch(60);
  assert(other != first); /* but for one at a time */
  give_scratch(first);
  give_scratch(other);
  char* larger = take_scratch(5000); /* too small ones make room */
  memset(larger, 1, 5000);
  give_scratch(larger);
  assert(take_scratch(5000) == larger);
  give_scratch(larger);
  char* large = take_scratch(KEPT_BYTES + 1); /* takes none of those kept, and is not kept */
  memset(large, 1, KEPT_BYTES + 1);
  give_scratch(large);
  assert(take_scratch(5000) == larger);
  give_scratch(larger);
  char* many[2 * KEPT];
  for (int i = 0; i < 2 * KEPT; ++i) many[i] = take_scratch(64);
  for (int i = 0; i < 2 * KEPT; ++i) give_scratch(many[i]);
  int held = 0;
  for (int i = 0; i < KEPT; ++i) held += kept[i] != NULL;
  assert(held == KEPT);
  give_scratch(NULL);
  pthread_t threads[8];
  for (uintptr_t i = 0; i < 8; ++i) pthread_create(&threads[i], NULL, work, (void*)i);
  for (int i = 0; i < 8; ++i) pthread_join(threads[i], NULL);
  return 0;
}
"""


def test_blocks_are_kept_and_are_for_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "scratch.c").write_text(PROGRAM)
    program = tmp_path / "scratch"
    folder = str(files("fusenorm") / "lower")
    compiler = _compiler(Target.host())
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-pthread", f"-I{folder}"]
    if "ziglang" not in compiler:  # has no such libraries
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*compiler, *flags, "scratch.c", "-o", program], check=True, cwd=tmp_path)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # no leak either: the destructor frees what is kept
