// y = x · Wᵀ in tiles of 32 tokens and 32 rows: 64 threads, each four by four outputs, 32 columns at a time.
@group(0) @binding(1) var<storage, read> x: array<f32>;

var<workgroup> xs: array<f32, 1056>;
var<workgroup> ws: array<f32, 1056>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let first_row = (group.z * groups_there.y + group.y) * 32u;
    let first_token = group.x * 32u;
    let tr = (thread & 7u) * 4u;
    let tt = (thread >> 3u) * 4u;
    var sums: array<vec4<f32>, 4>;
    for (var k = 0u; k < 4u; k += 1u) {
        sums[k] = vec4<f32>(0.0);
    }
    for (var first = 0u; first < p.cols; first += 32u) {
        for (var item = thread; item < 128u; item += 64u) {
            let row = item >> 2u;
            let c = first + (item & 3u) * 8u;
            var w = Eight(vec4<f32>(0.0), vec4<f32>(0.0));
            if (first_row + row < p.rows && c < p.cols) {
                w = weights8(p.first + first_row + row, c);
            }
            let to = row * 33u + (item & 3u) * 8u;
            let values = array<f32, 8>(w.a.x, w.a.y, w.a.z, w.a.w, w.b.x, w.b.y, w.b.z, w.b.w);
            for (var k = 0u; k < 8u; k += 1u) {
                ws[to + k] = select(0.0, values[k], c + k < p.cols);
            }
        }
        for (var item = thread; item < 1024u; item += 64u) {
            let t = item >> 5u;
            let c = first + (item & 31u);
            var value = 0.0;
            if (first_token + t < p.tokens && c < p.cols) {
                value = x[(first_token + t) * p.x_stride + p.x_first + c];
            }
            xs[t * 33u + (item & 31u)] = value;
        }
        workgroupBarrier();
        for (var k = 0u; k < 32u; k += 1u) {
            let w = vec4<f32>(ws[tr * 33u + k], ws[tr * 33u + 33u + k], ws[tr * 33u + 66u + k], ws[tr * 33u + 99u + k]);
            sums[0] += w * xs[tt * 33u + k];
            sums[1] += w * xs[tt * 33u + 33u + k];
            sums[2] += w * xs[tt * 33u + 66u + k];
            sums[3] += w * xs[tt * 33u + 99u + k];
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i += 1u) {
        for (var j = 0u; j < 4u; j += 1u) {
            if (first_token + tt + i < p.tokens && first_row + tr + j < p.rows) {
                store(first_token + tt + i, first_row + tr + j, sums[i][j]);
            }
        }
    }
}
