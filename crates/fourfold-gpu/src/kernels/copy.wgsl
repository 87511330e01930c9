// Copies a matrix between rows of other lengths: y[r · y_stride + y_first + c] = x[r' · x_stride + x_first + c], where r' is r, or
// r / repeat, or rows[r].
struct Params {
    count: u32,
    cols: u32,
    x_stride: u32,
    x_first: u32,
    y_stride: u32,
    y_first: u32,
    repeat: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> rows: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// Whether rows are named.
override NAMED: u32 = 0u;

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
    let r = i / p.cols;
    let c = i % p.cols;
    var base = r / p.repeat;
    if (NAMED == 1u) {
        base = rows[r];
    }
    y[r * p.y_stride + p.y_first + c] = x[base * p.x_stride + p.x_first + c];
}
