// Vectors of 16 floats: AVX-512 F, DQ, BW and VL.
#define REGROW_ISA_AVX512
#include "isa.h"

REGROW_TABLE(kAvx512Table, "avx512");
