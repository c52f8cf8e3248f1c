// Views of JPEG files: of each file only the rows and columns that its view needs are decoded (libjpeg-turbo), scaled as they
// come, and written into a batch. The pixels are Pillow's, bit for bit: crop, resize (antialiased bilinear), crop, mirror.
// What libjpeg warns about, and what is not plainly 8-bit gray, YCbCr or RGB standing upright, is refused: it is Pillow's.
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

#ifndef JCS_EXTENSIONS
#error "libjpeg-turbo is needed"
#endif

namespace {

constexpr int OK = 0, REFUSED = 1;
constexpr int BITS = 22;  // of a weight's fraction, as in Pillow's resize of 8-bit images
constexpr int ROWS = 4;   // scaled horizontally at once: their pixels, of 4 bytes, fill one vector
constexpr int MARGIN = 8; // columns beside a crop, so that its chroma is interpolated as in the whole photo

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int32_t ints16 __attribute__((vector_size(64)));

inline ints16 load16(const uint8_t* from) {
    bytes16 b;
    std::memcpy(&b, from, 16);
    return __builtin_convertvector(b, ints16);
}

inline void store16(ints16 sums, uint8_t* to) {
    // Weights are positive and add up to one, so that a sum never leaves 0..255.
    const bytes16 b = __builtin_convertvector(sums >> BITS, bytes16);
    std::memcpy(to, &b, 16);
}

// As data/decode.py's columns: a crop of the photo, the size it is scaled to, the corner of the window taken from that.
struct View {
    int32_t top, left, height, width, rows, columns, y, x, mirrored;
};

// The weights of a resize of `in` pixels to `out`, for `count` of the outputs from `first` on: Pillow's precompute_coeffs.
struct Weights {
    int size = 0;              // the most inputs of one output
    std::vector<int> start, n;  // of each output, its first input and their number
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
                const double at = (k + from - center + 0.5) * inverse, away = at < 0 ? -at : at;
                sum += exact[k] = away < 1 ? 1 - away : 0;
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

void give_up(j_common_ptr info) { std::longjmp(reinterpret_cast<Error*>(info->err)->jump, 1); }
void say_nothing(j_common_ptr) {}

bool upright(const jpeg_decompress_struct& info);

class Reader {
  public:
    Reader() {
        info.err = jpeg_std_error(&error.manager);
        error.manager.error_exit = give_up;
        error.manager.output_message = say_nothing;
        if (!setjmp(error.jump)) {  // fails where the library is another than the header
            jpeg_create_decompress(&info);
            jpeg_save_markers(&info, JPEG_APP0 + 1, 0xffff);
            made = true;
        }
    }
    ~Reader() {
        if (made) jpeg_destroy_decompress(&info);
    }

    int size(const uint8_t* data, long bytes, int32_t* height_width) {
        if (!made || setjmp(error.jump)) return refuse();
        if (!begin(data, bytes)) return refuse();
        height_width[0] = int32_t(info.image_height), height_width[1] = int32_t(info.image_width);
        jpeg_abort_decompress(&info);
        return OK;
    }

    // to: uint8 (height, width, 3).
    int view(const uint8_t* data, long bytes, const View& v, int height, int width, uint8_t* to) {
        across.make(v.width, v.columns, v.x, width);
        down.make(v.height, v.rows, v.y, height);
        if (!made || setjmp(error.jump)) return refuse();
        if (!begin(data, bytes)) return refuse();
        if (v.top + v.height > int(info.image_height) || v.left + v.width > int(info.image_width)) return refuse();
        decode(v, width);
        if (error.manager.num_warnings) return refuse();
        jpeg_abort_decompress(&info);
        scale_down(height, width, to);
        return OK;
    }

  private:
    jpeg_decompress_struct info{};
    Error error{};
    bool made = false;
    Weights across, down;
    std::vector<uint8_t> lines, quads, scaled;  // decoded rows; four of them side by side; rows scaled across

    static int spaced(int width) { return width * 3 + 16; }  // bytes from a row of `scaled` to the next

    int refuse() {
        if (made) jpeg_abort_decompress(&info);
        return REFUSED;
    }

    bool begin(const uint8_t* data, long bytes) {
        // A file that does not end as it should may be cut short: whether it can be read is for Pillow to say.
        if (bytes < 4 || data[0] != 0xff || data[1] != 0xd8 || data[bytes - 2] != 0xff || data[bytes - 1] != 0xd9) return false;
        error.manager.num_warnings = 0;
        jpeg_mem_src(&info, data, (unsigned long)bytes);
        if (jpeg_read_header(&info, TRUE) != JPEG_HEADER_OK) return false;
        const auto space = info.jpeg_color_space;
        return (space == JCS_GRAYSCALE || space == JCS_YCbCr || space == JCS_RGB) && info.data_precision == 8 && upright(info) &&
               !error.manager.num_warnings;
    }

    // Only the rows and columns that are needed, scaled across, into `scaled`: (rows, width, 3).
    void decode(const View& v, int width) {
        info.out_color_space = JCS_EXT_RGBX;
        jpeg_start_decompress(&info);
        const int first = v.left + across.start[0], end = v.left + across.end();
        JDIMENSION from = JDIMENSION(std::max(0, first - MARGIN)), wide = info.output_width;
        if (from > 0 || end + MARGIN < int(wide)) {
            wide = JDIMENSION(std::min(int(info.output_width), end + MARGIN)) - from;
            jpeg_crop_scanline(&info, &from, &wide);
        } else {
            from = 0;
        }
        const int top = v.top + down.start[0], rows = down.end() - down.start[0], pitch = int(wide) * 4;
        if (top > 0) jpeg_skip_scanlines(&info, JDIMENSION(top));
        lines.resize(size_t(ROWS) * pitch), quads.resize(size_t(ROWS) * pitch);
        scaled.resize(size_t(rows + ROWS) * spaced(width));
        for (int row = 0; row < rows; row += ROWS) {
            const int some = std::min(ROWS, rows - row);
            for (int i = 0; i < some;) {
                JSAMPROW line[ROWS];
                for (int j = i; j < some; j++) line[j] = lines.data() + size_t(j) * pitch;
                const int came = int(jpeg_read_scanlines(&info, line + i, JDIMENSION(some - i)));
                if (came == 0) give_up(reinterpret_cast<j_common_ptr>(&info));
                i += came;
            }
            scale_across(first - int(from), end - first, pitch, width, v.mirrored, scaled.data() + size_t(row) * spaced(width));
        }
    }

    void scale_across(int skip, int pixels, int pitch, int width, bool mirrored, uint8_t* to) {
        const uint32_t* line[ROWS];
        for (int r = 0; r < ROWS; r++) line[r] = reinterpret_cast<const uint32_t*>(lines.data() + size_t(r) * pitch) + skip;
        uint32_t* quad = reinterpret_cast<uint32_t*>(quads.data());
        for (int p = 0; p < pixels; p++)
            for (int r = 0; r < ROWS; r++) quad[p * ROWS + r] = line[r][p];
        const int first = across.start[0], row = spaced(width);
        for (int p = 0; p < width; p++) {
            const int c = mirrored ? width - 1 - p : p;
            const uint8_t* at = quads.data() + size_t(across.start[c] - first) * 16;
            const int32_t* weight = &across.weight[size_t(c) * across.size];
            ints16 sums = ints16{} + (1 << (BITS - 1));
            for (int k = 0; k < across.n[c]; k++) sums += load16(at + 16 * k) * weight[k];
            uint8_t out[16];
            store16(sums, out);
            // Four bytes each, of which the next pixel overwrites the last.
            for (int r = 0; r < ROWS; r++) std::memcpy(to + r * row + p * 3, out + 4 * r, 4);
        }
    }

    void scale_down(int height, int width, uint8_t* to) {
        const int row = width * 3, apart = spaced(width), first = down.start[0];
        for (int y = 0; y < height; y++, to += row) {
            const uint8_t* from = scaled.data() + size_t(down.start[y] - first) * apart;
            const int32_t* weight = &down.weight[size_t(y) * down.size];
            int i = 0;
            for (; i + 64 <= row; i += 64) {
                ints16 a = ints16{} + (1 << (BITS - 1)), b = a, c = a, d = a;
                for (int k = 0; k < down.n[y]; k++) {
                    const uint8_t* at = from + size_t(k) * apart + i;
                    a += load16(at) * weight[k], b += load16(at + 16) * weight[k];
                    c += load16(at + 32) * weight[k], d += load16(at + 48) * weight[k];
                }
                store16(a, to + i), store16(b, to + i + 16), store16(c, to + i + 32), store16(d, to + i + 48);
            }
            for (; i + 16 <= row; i += 16) {
                ints16 a = ints16{} + (1 << (BITS - 1));
                for (int k = 0; k < down.n[y]; k++) a += load16(from + size_t(k) * apart + i) * weight[k];
                store16(a, to + i);
            }
            for (; i < row; i++) {
                int32_t sum = 1 << (BITS - 1);
                for (int k = 0; k < down.n[y]; k++) sum += from[size_t(k) * apart + i] * weight[k];
                to[i] = uint8_t(sum >> BITS);
            }
        }
    }
};

// Whether no marker turns the photo: EXIF 2.3, tag Orientation (0x112) in the first directory; or XMP's. In doubt, no.
bool upright(const jpeg_decompress_struct& info) {
    int blocks = 0;
    bool told = false, in_doubt = false;
    for (auto marker = info.marker_list; marker; marker = marker->next) {
        const uint8_t* data = marker->data;
        const size_t length = marker->data_length;
        static const char xmp[] = "Orientation";
        if (length < 6 || std::memcmp(data, "Exif\0", 5)) {
            in_doubt |= std::search(data, data + length, xmp, xmp + sizeof xmp - 1) != data + length;
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
            told = true;
        }
    }
    return told || !in_doubt;
}

}  // namespace

extern "C" {

// height_width: int32 (n, 2). refused: uint8 (n,).
void sizes(int n, const uint8_t* const* data, const long* bytes, int32_t* height_width, uint8_t* refused) {
    Reader reader;
    for (int i = 0; i < n; i++) refused[i] = uint8_t(reader.size(data[i], bytes[i], height_width + 2 * i));
}

// views: int32 (n, 9). to: uint8 (n, height, width, 3). Those that are refused already are passed over.
void views(int n, const uint8_t* const* data, const long* bytes, const View* view, int height, int width, uint8_t* to,
           uint8_t* refused) {
    Reader reader;
    for (int i = 0; i < n; i++)
        if (!refused[i]) refused[i] = uint8_t(reader.view(data[i], bytes[i], view[i], height, width, to + size_t(i) * height * width * 3));
}
}
