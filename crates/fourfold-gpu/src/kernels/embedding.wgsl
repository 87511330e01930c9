// y[i] = W[ids[i]], of the ids whose rows are in this part of the weight.
@group(0) @binding(1) var<storage, read> ids: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let c = (group.x * 64u + thread) * 8u;
    let id = ids[group.y];
    if (c >= p.cols || id < p.weight_first || id >= p.weight_first + p.rows) {
        return;
    }
    let w = weights8(id - p.weight_first, c);
    let values = array<f32, 8>(w.a.x, w.a.y, w.a.z, w.a.w, w.b.x, w.b.y, w.b.z, w.b.w);
    for (var k = 0u; k < min(8u, p.cols - c); k += 1u) {
        y[group.y * p.y_stride + p.y_first + c + k] = values[k];
    }
}
