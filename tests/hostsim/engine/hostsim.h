// hostsim.h - CUDA C++ for a C++ compiler: included by kernels_cu/common/dev.cuh when nvcc is not the one reading.
#pragma once
#include "keywords.h"
#include "collectives.h"
#include "half.h"
#include "intrinsics.h"
#include "tensor_core.h"
