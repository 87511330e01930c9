// Operations on elements, in x's memory.
struct Params {
    count: u32,
    cols: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read> y: array<f32>;

// 0: x += y; 1: x = silu(x) · y; 2: x += y in each row of `cols`; 3: x = 0.
override OPERATION: u32 = 0u;

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
    if (OPERATION == 0u) {
        x[i] += y[i];
    } else if (OPERATION == 1u) {
        // exp overflows to infinity for gates far below zero, and the quotient is then zero.
        let gate = x[i];
        x[i] = gate / (1.0 + exp(-gate)) * y[i];
    } else if (OPERATION == 2u) {
        x[i] += y[i % p.cols];
    } else {
        x[i] = 0.0;
    }
}
