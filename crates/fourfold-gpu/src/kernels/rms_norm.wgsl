// y = x / √(mean(x²) + eps) · weight, a workgroup a row; the squares are added in a fixed tree.
struct Params {
    cols: u32,
    eps: f32,
    rows: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups_there.x + group.x;
    // A grid of two axes may have more rows than there are: the last one is computed again.
    let first = min(row, p.rows - 1u) * p.cols;
    var sum = 0.0;
    for (var c = thread; c < p.cols; c += 64u) {
        let v = x[first + c];
        sum += v * v;
    }
    sums[thread] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (thread < half) {
            sums[thread] += sums[thread + half];
        }
        workgroupBarrier();
    }
    let factor = 1.0 / sqrt(sums[0] / f32(p.cols) + p.eps);
    for (var c = thread; c < p.cols; c += 64u) {
        y[first + c] = x[first + c] * factor * weight[c];
    }
}
