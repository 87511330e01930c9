// y[t, row] = x[t] · W[first + row]: 32 lanes a row, each eight columns at a time, their sums added in a fixed tree.
@group(0) @binding(1) var<storage, read> x: array<f32>;

var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(32, 4)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_id) lane: vec3<u32>,
) {
    let row = (group.y * groups_there.x + group.x) * 4u + lane.y;
    let t = group.z;
    var sum = 0.0;
    if (row < p.rows) {
        let r = p.first + row;
        let base = t * p.x_stride + p.x_first;
        for (var c = lane.x * 8u; c < p.cols; c += 256u) {
            let w = weights8(r, c);
            let i = base + c;
            if (c + 8u <= p.cols) {
                sum += dot(w.a, vec4<f32>(x[i], x[i + 1u], x[i + 2u], x[i + 3u]))
                    + dot(w.b, vec4<f32>(x[i + 4u], x[i + 5u], x[i + 6u], x[i + 7u]));
            } else {
                let values = array<f32, 8>(w.a.x, w.a.y, w.a.z, w.a.w, w.b.x, w.b.y, w.b.z, w.b.w);
                for (var k = 0u; k < p.cols - c; k += 1u) {
                    sum += values[k] * x[i + k];
                }
            }
        }
    }
    let at = lane.y * 32u + lane.x;
    sums[at] = sum;
    workgroupBarrier();
    for (var half = 16u; half > 0u; half >>= 1u) {
        if (lane.x < half) {
            sums[at] += sums[at + half];
        }
        workgroupBarrier();
    }
    if (lane.x == 0u && row < p.rows) {
        store(t, row, sums[at]);
    }
}
