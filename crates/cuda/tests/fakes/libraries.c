/* Functions that tell what they were given, in the place of CUDA's. */

int cuInit(unsigned flags) { return (int)flags + 1; }

/* Not its own arguments: as many as do not all lie in registers, of both kinds. */
double cublasGemmEx(long a, double p, long b, double q, long c, long d, double r, long e, long f, long g, double s, long h)
{
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 0.5 * p + 0.25 * q + 0.125 * r + 0.0625 * s;
}
