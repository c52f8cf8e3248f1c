// Decodes views (crop, antialiased bilinear resize, crop, flip) of JPEG files into a batch. Only the rows and columns of the view
// are decoded (libjpeg-turbo), and they are resized on the fly. The pixels equal Pillow's exactly. Files that are not upright
// 8-bit gray, YCbCr or RGB, and files that libjpeg warns about, are refused; the caller reads them with Pillow.
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

#ifndef JCS_EXTENSIONS
#error "libjpeg-turbo is required"
#endif

namespace {

constexpr int OK = 0, REFUSED = 1;
constexpr int BITS = 22;   // fraction bits of a weight, as in Pillow's resize of 8-bit images
constexpr int ROWS = 4;    // rows resized horizontally at once: one 4-byte pixel of each fills a vector
constexpr int MARGIN = 8;  // extra columns decoded beside a crop, so that its chroma is upsampled as in the whole image

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int32_t ints16 __attribute__((vector_size(64)));

inline ints16 load16(const uint8_t* from) {
    bytes16 b;
    std::memcpy(&b, from, 16);
    return __builtin_convertvector(b, ints16);
}

inline void store16(ints16 sums, uint8_t* to) {
    // Weights are positive and sum to 1, so the sums stay within 0..255.
    const bytes16 b = __builtin_convertvector(sums >> BITS, bytes16);
    std::memcpy(to, &b, 16);
}

// A crop of the image, the size it is resized to, and the corner of the final crop. The layout is that of data/images/decode.py.
struct View {
    int32_t top, left, height, width, rows, columns, y, x, mirrored;
};

// Weights of a resize from `in` to `out` pixels, for `count` outputs starting at `first`: Pillow's precompute_coeffs.
struct Weights {
    int size = 0;               // maximum number of inputs of an output
    std::vector<int> start, n;  // per output: first input, number of inputs
    std::vector<int32_t> weight;
    std::vector<double> exact;

    void make(int in, int out, int first, int count) {
        const double scale = double(in) / out, support = std::max(scale, 1.0), inverse = 1.0 / support;
        size = int(std::ceil(support)) * 2 + 1;
        start.resize(count), n.resize(count), exact.resize(size), weight.assign(size_t(count) * size, 0);
        for (int i = 0; i < count; i++) {
            const double center = (first + i + 0.5) * scale;
            const int from = std::max(0, int(center - support + 0.5)), to = std::min(in, int(center + support + 0.5));
            double sum = 0;
            for (int k = 0; k < to - from; k++) {
                const double at = (k + from - center + 0.5) * inverse, distance = at < 0 ? -at : at;
                sum += exact[k] = distance < 1 ? 1 - distance : 0;
            }
            start[i] = from, n[i] = to - from;
            for (int k = 0; k < to - from; k++) {
                if (sum != 0) exact[k] /= sum;
                weight[size_t(i) * size + k] = int32_t(0.5 + exact[k] * (1 << BITS));
            }
        }
    }
    int end() const { return start.back() + n.back(); }
};

struct Error {
    jpeg_error_mgr manager;
    std::jmp_buf jump;
};

void fail(j_common_ptr info) { std::longjmp(reinterpret_cast<Error*>(info->err)->jump, 1); }
void ignore_message(j_common_ptr) {}

bool upright(const jpeg_decompress_struct& info);

class Reader {
  public:
    Reader() {
        info.err = jpeg_std_error(&error.manager);
        error.manager.error_exit = fail;
        error.manager.output_message = ignore_message;
        if (!setjmp(error.jump)) {  // fails if the versions of library and header differ
            jpeg_create_decompress(&info);
            jpeg_save_markers(&info, JPEG_APP0 + 1, 0xffff);
            created = true;
        }
    }
    ~Reader() {
        if (created) jpeg_destroy_decompress(&info);
    }

    int size(const uint8_t* data, long bytes, int32_t* height_width) {
        if (!created || setjmp(error.jump)) return refuse();
        if (!begin(data, bytes)) return refuse();
        height_width[0] = int32_t(info.image_height), height_width[1] = int32_t(info.image_width);
        jpeg_abort_decompress(&info);
        return OK;
    }

    // to: uint8 (height, width, 3).
    int view(const uint8_t* data, long bytes, const View& v, int height, int width, uint8_t* to) {
        horizontal.make(v.width, v.columns, v.x, width);
        vertical.make(v.height, v.rows, v.y, height);
        if (!created || setjmp(error.jump)) return refuse();
        if (!begin(data, bytes)) return refuse();
        if (v.top + v.height > int(info.image_height) || v.left + v.width > int(info.image_width)) return refuse();
        decode(v, width);
        if (error.manager.num_warnings) return refuse();
        jpeg_abort_decompress(&info);
        resize_vertically(height, width, to);
        return OK;
    }

  private:
    jpeg_decompress_struct info{};
    Error error{};
    bool created = false;
    Weights horizontal, vertical;
    std::vector<uint8_t> lines, quads, resized;  // decoded rows; four of them interleaved; horizontally resized rows

    static int row_pitch(int width) { return width * 3 + 16; }  // bytes per row of `resized`

    int refuse() {
        if (created) jpeg_abort_decompress(&info);
        return REFUSED;
    }

    bool begin(const uint8_t* data, long bytes) {
        // A file without an end marker may be truncated; Pillow decides whether it can be read.
        if (bytes < 4 || data[0] != 0xff || data[1] != 0xd8 || data[bytes - 2] != 0xff || data[bytes - 1] != 0xd9) return false;
        error.manager.num_warnings = 0;
        jpeg_mem_src(&info, data, (unsigned long)bytes);
        if (jpeg_read_header(&info, TRUE) != JPEG_HEADER_OK) return false;
        const auto space = info.jpeg_color_space;
        return (space == JCS_GRAYSCALE || space == JCS_YCbCr || space == JCS_RGB) && info.data_precision == 8 && upright(info) &&
               !error.manager.num_warnings;
    }

    // Decodes the rows and columns of the view and resizes them horizontally into `resized`: (rows, width, 3).
    void decode(const View& v, int width) {
        info.out_color_space = JCS_EXT_RGBX;
        jpeg_start_decompress(&info);
        const int first = v.left + horizontal.start[0], end = v.left + horizontal.end();
        JDIMENSION from = JDIMENSION(std::max(0, first - MARGIN)), columns = info.output_width;
        if (from > 0 || end + MARGIN < int(columns)) {
            columns = JDIMENSION(std::min(int(info.output_width), end + MARGIN)) - from;
            jpeg_crop_scanline(&info, &from, &columns);
        } else {
            from = 0;
        }
        const int top = v.top + vertical.start[0], rows = vertical.end() - vertical.start[0], pitch = int(columns) * 4;
        if (top > 0) jpeg_skip_scanlines(&info, JDIMENSION(top));
        lines.resize(size_t(ROWS) * pitch), quads.resize(size_t(ROWS) * pitch);
        resized.resize(size_t(rows + ROWS) * row_pitch(width));
        for (int row = 0; row < rows; row += ROWS) {
            const int count = std::min(ROWS, rows - row);
            for (int i = 0; i < count;) {
                JSAMPROW line[ROWS];
                for (int j = i; j < count; j++) line[j] = lines.data() + size_t(j) * pitch;
                const int decoded = int(jpeg_read_scanlines(&info, line + i, JDIMENSION(count - i)));
                if (decoded == 0) fail(reinterpret_cast<j_common_ptr>(&info));
                i += decoded;
            }
            uint8_t* to = resized.data() + size_t(row) * row_pitch(width);
            resize_horizontally(first - int(from), end - first, pitch, width, v.mirrored, to);
        }
    }

    void resize_horizontally(int skip, int pixels, int pitch, int width, bool mirrored, uint8_t* to) {
        const uint32_t* line[ROWS];
        for (int r = 0; r < ROWS; r++) line[r] = reinterpret_cast<const uint32_t*>(lines.data() + size_t(r) * pitch) + skip;
        uint32_t* quad = reinterpret_cast<uint32_t*>(quads.data());
        for (int p = 0; p < pixels; p++)
            for (int r = 0; r < ROWS; r++) quad[p * ROWS + r] = line[r][p];
        const int first = horizontal.start[0], row = row_pitch(width);
        for (int p = 0; p < width; p++) {
            const int c = mirrored ? width - 1 - p : p;
            const uint8_t* at = quads.data() + size_t(horizontal.start[c] - first) * 16;
            const int32_t* weight = &horizontal.weight[size_t(c) * horizontal.size];
            ints16 sums = ints16{} + (1 << (BITS - 1));
            for (int k = 0; k < horizontal.n[c]; k++) sums += load16(at + 16 * k) * weight[k];
            uint8_t out[16];
            store16(sums, out);
            // Copies 4 bytes per row; the next pixel overwrites the fourth.
            for (int r = 0; r < ROWS; r++) std::memcpy(to + r * row + p * 3, out + 4 * r, 4);
        }
    }

    void resize_vertically(int height, int width, uint8_t* to) {
        const int row = width * 3, pitch = row_pitch(width), first = vertical.start[0];
        for (int y = 0; y < height; y++, to += row) {
            const uint8_t* from = resized.data() + size_t(vertical.start[y] - first) * pitch;
            const int32_t* weight = &vertical.weight[size_t(y) * vertical.size];
            int i = 0;
            for (; i + 64 <= row; i += 64) {
                ints16 a = ints16{} + (1 << (BITS - 1)), b = a, c = a, d = a;
                for (int k = 0; k < vertical.n[y]; k++) {
                    const uint8_t* at = from + size_t(k) * pitch + i;
                    a += load16(at) * weight[k], b += load16(at + 16) * weight[k];
                    c += load16(at + 32) * weight[k], d += load16(at + 48) * weight[k];
                }
                store16(a, to + i), store16(b, to + i + 16), store16(c, to + i + 32), store16(d, to + i + 48);
            }
            for (; i + 16 <= row; i += 16) {
                ints16 a = ints16{} + (1 << (BITS - 1));
                for (int k = 0; k < vertical.n[y]; k++) a += load16(from + size_t(k) * pitch + i) * weight[k];
                store16(a, to + i);
            }
            for (; i < row; i++) {
                int32_t sum = 1 << (BITS - 1);
                for (int k = 0; k < vertical.n[y]; k++) sum += from[size_t(k) * pitch + i] * weight[k];
                to[i] = uint8_t(sum >> BITS);
            }
        }
    }
};

// Whether no marker rotates the image: EXIF 2.3, tag Orientation (0x112) of the first directory, or XMP. False if unclear.
bool upright(const jpeg_decompress_struct& info) {
    int blocks = 0;
    bool exif_upright = false, xmp_orientation = false;
    for (auto marker = info.marker_list; marker; marker = marker->next) {
        const uint8_t* data = marker->data;
        const size_t length = marker->data_length;
        static const char xmp[] = "Orientation";
        if (length < 6 || std::memcmp(data, "Exif\0", 5)) {
            xmp_orientation |= std::search(data, data + length, xmp, xmp + sizeof xmp - 1) != data + length;
            continue;
        }
        if (++blocks > 1 || length < 14) return false;
        const uint8_t* tiff = data + 6;
        const size_t size = length - 6;
        const bool little = tiff[0] == 'I';
        if (!little && tiff[0] != 'M') return false;
        const auto u16 = [&](size_t at) { return little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1]; };
        const size_t directory = little ? u16(4) | size_t(u16(6)) << 16 : size_t(u16(4)) << 16 | u16(6);
        if (directory + 2 > size) return false;
        const size_t entries = u16(directory);
        if (directory + 2 + 12 * entries > size) return false;
        for (size_t i = 0; i < entries; i++) {
            const size_t at = directory + 2 + 12 * i;
            if (u16(at) != 0x112) continue;
            if (u16(at + 2) != 3 || u16(at + 8) != 1) return false;
            exif_upright = true;
        }
    }
    return exif_upright || !xmp_orientation;
}

}  // namespace

extern "C" {

// height_width: int32 (n, 2). refused: uint8 (n,).
void sizes(int n, const uint8_t* const* data, const long* bytes, int32_t* height_width, uint8_t* refused) {
    Reader reader;
    for (int i = 0; i < n; i++) refused[i] = uint8_t(reader.size(data[i], bytes[i], height_width + 2 * i));
}

// views: int32 (n, 9). to: uint8 (n, height, width, 3). Skips files that are refused already.
void views(int n, const uint8_t* const* data, const long* bytes, const View* view, int height, int width, uint8_t* to,
           uint8_t* refused) {
    Reader reader;
    for (int i = 0; i < n; i++)
        if (!refused[i])
            refused[i] = uint8_t(reader.view(data[i], bytes[i], view[i], height, width, to + size_t(i) * height * width * 3));
}
}
