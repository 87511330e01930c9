// y[t, c] = Σ_row x[t, row] · W[first + row, c]: a thread has eight columns of a token, and adds the rows in order.
@group(0) @binding(1) var<storage, read> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let c = (group.x * 64u + thread) * 8u;
    let t = group.y;
    if (c >= p.cols) {
        return;
    }
    var a = vec4<f32>(0.0);
    var b = vec4<f32>(0.0);
    for (var row = 0u; row < p.rows; row += 1u) {
        let w = weights8(p.first + row, c);
        let factor = x[t * p.x_stride + p.x_first + row];
        a += w.a * factor;
        b += w.b * factor;
    }
    let values = array<f32, 8>(a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w);
    for (var k = 0u; k < min(8u, p.cols - c); k += 1u) {
        let at = t * p.y_stride + p.y_first + c + k;
        if ((p.flags & ADD) != 0u) {
            y[at] += values[k];
        } else {
            y[at] = values[k];
        }
    }
}
