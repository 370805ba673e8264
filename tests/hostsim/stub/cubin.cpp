#include "cubin.h"

#include <elf.h>

#include <cstring>

namespace stub {

namespace {

constexpr int kMachineCuda = 190;
constexpr unsigned char kEntryPoint = 0x10;  // STO_CUDA_ENTRY in st_other
constexpr unsigned kFatbinMagic = 0xBA55ED50, kFatbinWrapperMagic = 0x466243B1;

// Attributes in .nv.info sections (cuobjdump -elf names them EIATTR_…).
constexpr int kMaxThreads = 0x05, kParamInfo = 0x17, kRegisterCount = 0x2f;
constexpr int kSizedValue = 4;  // format: 2 bytes of size, then the value

template <class T>
T read(const unsigned char *from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

struct File {
  const unsigned char *bytes;
  Elf64_Ehdr header;

  Elf64_Shdr section(int i) const { return read<Elf64_Shdr>(bytes + header.e_shoff + i * sizeof(Elf64_Shdr)); }
  std::string text(const Elf64_Shdr &strings, unsigned at) const {
    return reinterpret_cast<const char *>(bytes + strings.sh_offset + at);
  }
};

// Every attribute of an .nv.info section: visit(attribute, value, nbytes).
template <class Visit>
void for_attributes(const File &file, const Elf64_Shdr &section, Visit visit) {
  const unsigned char *at = file.bytes + section.sh_offset, *end = at + section.sh_size;
  while (at + 4 <= end) {
    int format = at[0], attribute = at[1], nbytes = format == kSizedValue ? read<uint16_t>(at + 2) : 0;
    if (format == kSizedValue) visit(attribute, at + 4, nbytes);
    at += 4 + nbytes;
  }
}

void read_kernel_info(const File &file, const Elf64_Shdr &section, Function &function) {
  for_attributes(file, section, [&](int attribute, const unsigned char *value, int) {
    if (attribute == kParamInfo) {
      unsigned ordinal = read<uint16_t>(value + 4);
      if (function.params.size() <= ordinal) function.params.resize(ordinal + 1);
      function.params[ordinal] = {read<uint16_t>(value + 6), read<uint32_t>(value + 8) >> 18};
    } else if (attribute == kMaxThreads) {
      function.max_threads = read<int>(value) * read<int>(value + 4) * read<int>(value + 8);
    }
  });
}

}  // namespace

Result read_cubin(const void *image, std::map<std::string, std::unique_ptr<Function>> &functions, int &sm) {
  auto *bytes = static_cast<const unsigned char *>(image);
  if (memcmp(bytes, ELFMAG, SELFMAG)) {
    unsigned magic = read<unsigned>(bytes);
    bool is_fatbin = magic == kFatbinMagic || magic == kFatbinWrapperMagic;
    say("the image is %s, no cubin", is_fatbin ? "a fatbin" : "not an ELF file (PTX?)");
    return INVALID_IMAGE;
  }
  File file{bytes, read<Elf64_Ehdr>(bytes)};
  if (file.header.e_machine != kMachineCuda || file.header.e_ident[EI_CLASS] != ELFCLASS64) {
    say("an ELF file of machine %d, no cubin", file.header.e_machine);
    return INVALID_IMAGE;
  }
  sm = (file.header.e_ident[EI_ABIVERSION] >= 8 ? file.header.e_flags >> 8 : file.header.e_flags) & 0xff;
  Elf64_Shdr names = file.section(file.header.e_shstrndx);
  std::map<unsigned, std::string> symbol_names;
  for (int i = 0; i < file.header.e_shnum; i++) {
    Elf64_Shdr section = file.section(i);
    if (section.sh_type != SHT_SYMTAB) continue;
    Elf64_Shdr strings = file.section(section.sh_link);
    for (unsigned s = 0; s < section.sh_size / sizeof(Elf64_Sym); s++) {
      auto symbol = read<Elf64_Sym>(bytes + section.sh_offset + s * sizeof(Elf64_Sym));
      symbol_names[s] = file.text(strings, symbol.st_name);
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || !(symbol.st_other & kEntryPoint)) continue;
      auto function = std::make_unique<Function>();
      function->name = symbol_names[s];
      function->sm = sm;
      functions[function->name] = std::move(function);
    }
  }
  auto find = [&](const std::string &name) {
    auto found = functions.find(name);
    return found == functions.end() ? nullptr : found->second.get();
  };
  for (int i = 0; i < file.header.e_shnum; i++) {
    Elf64_Shdr section = file.section(i);
    std::string name = file.text(names, section.sh_name);
    if (name.rfind(".nv.shared.", 0) == 0)
      if (Function *f = find(name.substr(11))) f->static_shared = static_cast<int>(section.sh_size);
    if (name.rfind(".nv.info.", 0) == 0)
      if (Function *f = find(name.substr(9))) read_kernel_info(file, section, *f);
    if (name == ".nv.info")
      for_attributes(file, section, [&](int attribute, const unsigned char *value, int) {
        if (attribute != kRegisterCount) return;
        if (Function *f = find(symbol_names[read<unsigned>(value)])) f->registers = read<int>(value + 4);
      });
  }
  return SUCCESS;
}

}  // namespace stub
