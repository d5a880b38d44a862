// Vectors of 8 floats: AVX2 and FMA.
#define REGROW_ISA_AVX2
#include "isa.h"

REGROW_TABLE(kAvx2Table, "avx2");
