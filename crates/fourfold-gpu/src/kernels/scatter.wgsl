// x[rows[i]] += factors[i] · y[i]: a thread has a column, and adds the rows in order, so that rows may repeat.
struct Params {
    count: u32,
    cols: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read> y: array<f32>;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read> factors: array<f32>;

// Whether no row repeats: then a thread has an element.
override ONCE: u32 = 0u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let at = (group.y * groups_there.x + group.x) * 64u + thread;
    if (ONCE == 1u) {
        if (at < p.count * p.cols) {
            let i = at / p.cols;
            x[rows[i] * p.cols + at % p.cols] += factors[i] * y[at];
        }
        return;
    }
    if (at >= p.cols) {
        return;
    }
    for (var i = 0u; i < p.count; i += 1u) {
        x[rows[i] * p.cols + at] += factors[i] * y[i * p.cols + at];
    }
}
