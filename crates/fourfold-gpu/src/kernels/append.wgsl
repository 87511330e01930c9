// Rounds rows to a cache's type and writes them after those it holds. A row of 16-bit elements begins at a word.
struct Params {
    count: u32,
    width: u32,
    words: u32,
    first: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> cache: array<u32>;

// 0: f32; 1: f16; 2: bf16.
override DTYPE: u32 = 1u;

// To nearest, ties to even; the same on every device.
fn f16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        return sign | 0x7e00u;
    }
    if (size >= 0x477ff000u) {
        return sign | 0x7c00u;
    }
    if (size < 0x38800000u) {
        // Below the smallest normal number: multiples of 2^-24.
        if (size < 0x33000000u) {
            return sign;
        }
        let exponent = size >> 23u;
        let mantissa = (size & 0x7fffffu) | 0x800000u;
        let shift = 126u - exponent;
        let whole = mantissa >> shift;
        let rest = mantissa & ((1u << shift) - 1u);
        let half = 1u << (shift - 1u);
        let up = select(0u, 1u, rest > half || (rest == half && (whole & 1u) == 1u));
        return sign | (whole + up);
    }
    let rounded = size + 0xfffu + ((size >> 13u) & 1u);
    return sign | ((rounded - 0x38000000u) >> 13u);
}

fn bf16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn narrow(i: u32, inside: bool) -> u32 {
    if (!inside) {
        return 0u;
    }
    if (DTYPE == 1u) {
        return f16_bits(x[i]);
    }
    return bf16_bits(x[i]);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups_there.x + group.x) * 64u + thread;
    if (i >= p.count) {
        return;
    }
    let r = i / p.words;
    let word = i % p.words;
    if (DTYPE == 0u) {
        cache[p.first + i] = bitcast<u32>(x[i]);
        return;
    }
    let at = r * p.width + 2u * word;
    cache[p.first + i] = narrow(at, true) | (narrow(at + 1u, 2u * word + 1u < p.width) << 16u);
}
