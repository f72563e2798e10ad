// The reader of pickles: what it reads, and the programs it refuses to be (group A2).
#include "helpers.hpp"

using namespace test;
using nanogpt::detail::parse_pickle;
using nanogpt::detail::PickleFor;
using nanogpt::detail::PickleKind;
using nanogpt::detail::PickleTree;
using nanogpt::detail::PickleValue;
using nanogpt::detail::ZipFile;

namespace {

// Written by torch 1.13: a state dict of four tensors, and a dict of views with every integer type.
// clang-format off
constexpr std::string_view kFixtureA =
    "UEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAAVAA0AbW9kZWxfMDAwMDEwL2RhdGEucGtsRkIJAFpaWlpaWlpaWoACY2Nv"
    "bGxlY3Rpb25zCk9yZGVyZWREaWN0CnEAKVJxAShYDQAAAHJlc2lkX2xhbWJkYXNxAmN0b3JjaC5fdXRpbHMKX3JlYnVp"
    "bGRfdGVuc29yX3YyCnEDKChYBwAAAHN0b3JhZ2VxBGN0b3JjaApGbG9hdFN0b3JhZ2UKcQVYAQAAADBxBlgDAAAAY3B1"
    "cQdLAnRxCFFLAEsChXEJSwGFcQqJaAApUnELdHEMUnENWBYAAAB0cmFuc2Zvcm1lci53dGUud2VpZ2h0cQ5oAygoaARj"
    "dG9yY2gKQkZsb2F0MTZTdG9yYWdlCnEPWAEAAAAxcRBoB0sgdHERUUsASwhLBIZxEksESwGGcROJaAApUnEUdHEVUnEW"
    "WBYAAAB0cmFuc2Zvcm1lci5oLjAud2VpZ2h0cRdoAygoaARoBVgBAAAAMnEYaAdLEHRxGVFLAEsESwSGcRpLBEsBhnEb"
    "iWgAKVJxHHRxHVJxHlgOAAAAbG1faGVhZC53ZWlnaHRxH2gDKChoBGgFWAEAAAAzcSBoB0sgdHEhUUsASwhLBIZxIksE"
    "SwGGcSOJaAApUnEkdHElUnEmdX1xJ1gJAAAAX21ldGFkYXRhcShoAClScSkoWAAAAABxKn1xK1gHAAAAdmVyc2lvbnEs"
    "SwFzWAsAAAB0cmFuc2Zvcm1lcnEtfXEuaCxLAXNYDwAAAHRyYW5zZm9ybWVyLnd0ZXEvfXEwaCxLAXNYDQAAAHRyYW5z"
    "Zm9ybWVyLmhxMX1xMmgsSwFzWA8AAAB0cmFuc2Zvcm1lci5oLjBxM31xNGgsSwFzWAcAAABsbV9oZWFkcTV9cTZoLEsB"
    "c3VzYi5QSwcIhb7RwHcCAAB3AgAAUEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAATAAgAbW9kZWxfMDAwMDEwL2RhdGEv"
    "MEZCBABaWlpaAACAPwAAgD9QSwcIkFEG1QgAAAAIAAAAUEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAATADcAbW9kZWxf"
    "MDAwMDEwL2RhdGEvMUZCMwBaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlqu"
    "vxE/Ur+av0e/xz8Iv4C/2DuOvys/uz47PpE/3T6Uv70/mT4Nv2o/nT8vP6O9aT+kv5o+fb/0v4i8tz5wPwM+UEsHCPkV"
    "lUBAAAAAQAAAAFBLAwQAAAgIAAAAAAAAAAAAAAAAAAAAAAAAEwA/AG1vZGVsXzAwMDAxMC9kYXRhLzJGQjsAWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlqIIeU9GK+EvoKJqL6EFoE+"
    "YKUPvaAB771qq+G+QO8CPfhz2D4454m9gPxbvhAI9j6sJCc+NLcBPsAmlrwMPuU+UEsHCKuqCLJAAAAAQAAAAFBLAwQA"
    "AAgIAAAAAAAAAAAAAAAAAAAAAAAAEwA/AG1vZGVsXzAwMDAxMC9kYXRhLzNGQjsAWlpaWlpaWlpaWlpaWlpaWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpA/H68KN1CvggQlb74EmI+wJz1vkyTxL7owcA+yMli"
    "PgBfgr1AA2C+Wib/vpCuIr6i1co+bj2/PgLEkD5A1Ce+vEFzvqYHsz7A8UI87N6JPgDV7b6MUCc+/OjePv7u0T7g6BK9"
    "iFlfPoba3L4acsa+/LbCvjbK1b5M7Im+pLLkPlBLBwi5s7ZugAAAAIAAAABQSwMEAAAICAAAAAAAAAAAAAAAAAAAAAAA"
    "ABQAPgBtb2RlbF8wMDAwMTAvdmVyc2lvbkZCOgBaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaMwpQSwcI0Z5nVQIAAAACAAAAUEsBAgAAAAAICAAAAAAAAIW+0cB3AgAAdwIAABUAAAAA"
    "AAAAAAAAAAAAAAAAAG1vZGVsXzAwMDAxMC9kYXRhLnBrbFBLAQIAAAAACAgAAAAAAACQUQbVCAAAAAgAAAATAAAAAAAA"
    "AAAAAAAAAMcCAABtb2RlbF8wMDAwMTAvZGF0YS8wUEsBAgAAAAAICAAAAAAAAPkVlUBAAAAAQAAAABMAAAAAAAAAAAAA"
    "AAAAGAMAAG1vZGVsXzAwMDAxMC9kYXRhLzFQSwECAAAAAAgIAAAAAAAAq6oIskAAAABAAAAAEwAAAAAAAAAAAAAAAADQ"
    "AwAAbW9kZWxfMDAwMDEwL2RhdGEvMlBLAQIAAAAACAgAAAAAAAC5s7ZugAAAAIAAAAATAAAAAAAAAAAAAAAAAJAEAABt"
    "b2RlbF8wMDAwMTAvZGF0YS8zUEsBAgAAAAAICAAAAAAAANGeZ1UCAAAAAgAAABQAAAAAAAAAAAAAAAAAkAUAAG1vZGVs"
    "XzAwMDAxMC92ZXJzaW9uUEsGBiwAAAAAAAAAHgMtAAAAAAAAAAAABgAAAAAAAAAGAAAAAAAAAIkBAAAAAAAAEgYAAAAA"
    "AABQSwYHAAAAAJsHAAAAAAAAAQAAAFBLBQYAAAAABgAGAIkBAAASBgAAAAA=";

constexpr std::string_view kFixtureB =
    "UEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAAOABQAdmlld3MvZGF0YS5wa2xGQhAAWlpaWlpaWlpaWlpaWlpaWoACfXEA"
    "KFgBAAAAYXEBY3RvcmNoLl91dGlscwpfcmVidWlsZF90ZW5zb3JfdjIKcQIoKFgHAAAAc3RvcmFnZXEDY3RvcmNoCklu"
    "dFN0b3JhZ2UKcQRYAQAAADBxBVgDAAAAY3B1cQZLCnRxB1FLAksEhXEISwGFcQmJY2NvbGxlY3Rpb25zCk9yZGVyZWRE"
    "aWN0CnEKKVJxC3RxDFJxDVgBAAAAYnEOaAIoKGgDaARoBWgGSwp0cQ9RSwBLCoVxEEsBhXERiWgKKVJxEnRxE1JxFFgB"
    "AAAAaHEVaAIoKGgDY3RvcmNoCkhhbGZTdG9yYWdlCnEWWAEAAAAxcRdoBksKdHEYUUsASwqFcRlLAYVxGoloCilScRt0"
    "cRxScR1YAQAAAGNxHmgCKChoA2gEaAVoBksKdHEfUUsASwVLAoZxIEsBSwWGcSGJaAopUnEidHEjUnEkWAQAAABib29s"
    "cSVoAigoaANjdG9yY2gKQm9vbFN0b3JhZ2UKcSZYAQAAADJxJ2gGSwp0cShRSwBLCoVxKUsBhXEqiWgKKVJxK3RxLFJx"
    "LVgDAAAAZjY0cS5oAigoaANjdG9yY2gKRG91YmxlU3RvcmFnZQpxL1gBAAAAM3EwaAZLCnRxMVFLAEsKhXEySwGFcTOJ"
    "aAopUnE0dHE1UnE2WAMAAABpNjRxN2gCKChoA2N0b3JjaApMb25nU3RvcmFnZQpxOFgBAAAANHE5aAZLCnRxOlFLAEsK"
    "hXE7SwGFcTyJaAopUnE9dHE+UnE/dS5QSwcILgETwkQCAABEAgAAUEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAAMAEIA"
    "dmlld3MvZGF0YS8wRkI+AFpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpa"
    "WlpaWlpaWlpaAAAAAAEAAAACAAAAAwAAAAQAAAAFAAAABgAAAAcAAAAIAAAACQAAAFBLBwgCee+NKAAAACgAAABQSwME"
    "AAAICAAAAAAAAAAAAAAAAAAAAAAAAAwAHgB2aWV3cy9kYXRhLzFGQhoAWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWloA"
    "AAA8AEAAQgBEAEUARgBHAEiASFBLBwhoYoS2FAAAABQAAABQSwMEAAAICAAAAAAAAAAAAAAAAAAAAAAAAAwAMgB2aWV3"
    "cy9kYXRhLzJGQi4AWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWgAAAAABAQEBAQFQ"
    "SwcI5p7UwgoAAAAKAAAAUEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAAMADwAdmlld3MvZGF0YS8zRkI4AFpaWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaAAAAAAAAAAAAAAAAAADwPwAAAAAA"
    "AABAAAAAAAAACEAAAAAAAAAQQAAAAAAAABRAAAAAAAAAGEAAAAAAAAAcQAAAAAAAACBAAAAAAAAAIkBQSwcI2QBiRlAA"
    "AABQAAAAUEsDBAAACAgAAAAAAAAAAAAAAAAAAAAAAAAMADYAdmlld3MvZGF0YS80RkIyAFpaWlpaWlpaWlpaWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaAAAAAAAAAAABAAAAAAAAAAIAAAAAAAAAAwAAAAAAAAAEAAAA"
    "AAAAAAUAAAAAAAAABgAAAAAAAAAHAAAAAAAAAAgAAAAAAAAACQAAAAAAAABQSwcIpOSFXlAAAABQAAAAUEsDBAAACAgA"
    "AAAAAAAAAAAAAAAAAAAAAAANADUAdmlld3MvdmVyc2lvbkZCMQBaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpa"
    "WlpaWlpaWlpaWlpaWlpaWlpaMwpQSwcI0Z5nVQIAAAACAAAAUEsBAgAAAAAICAAAAAAAAC4BE8JEAgAARAIAAA4AAAAA"
    "AAAAAAAAAAAAAAAAAHZpZXdzL2RhdGEucGtsUEsBAgAAAAAICAAAAAAAAAJ5740oAAAAKAAAAAwAAAAAAAAAAAAAAAAA"
    "lAIAAHZpZXdzL2RhdGEvMFBLAQIAAAAACAgAAAAAAABoYoS2FAAAABQAAAAMAAAAAAAAAAAAAAAAADgDAAB2aWV3cy9k"
    "YXRhLzFQSwECAAAAAAgIAAAAAAAA5p7UwgoAAAAKAAAADAAAAAAAAAAAAAAAAACkAwAAdmlld3MvZGF0YS8yUEsBAgAA"
    "AAAICAAAAAAAANkAYkZQAAAAUAAAAAwAAAAAAAAAAAAAAAAAGgQAAHZpZXdzL2RhdGEvM1BLAQIAAAAACAgAAAAAAACk"
    "5IVeUAAAAFAAAAAMAAAAAAAAAAAAAAAAAOAEAAB2aWV3cy9kYXRhLzRQSwECAAAAAAgIAAAAAAAA0Z5nVQIAAAACAAAA"
    "DQAAAAAAAAAAAAAAAACgBQAAdmlld3MvdmVyc2lvblBLBgYsAAAAAAAAAB4DLQAAAAAAAAAAAAcAAAAAAAAABwAAAAAA"
    "AACZAQAAAAAAABIGAAAAAAAAUEsGBwAAAACrBwAAAAAAAAEAAABQSwUGAAAAAAcABwCZAQAAEgYAAAAA";
// clang-format on

PickleTree parse(std::string_view pickle, PickleFor what = PickleFor::checkpoint) {
    return parse_pickle(bytes_of(pickle), what);
}

PickleWriter start() { return PickleWriter().proto(2); }

struct BadPickle {
    std::string name;
    std::string pickle;
    std::string reason;  // must be part of the message
};

// Every opcode of protocols 0 to 5 that a state dict never needs, with an argument it would accept.
std::vector<BadPickle> forbidden_opcodes() {
    struct Opcode {
        int code;
        const char* name;
        const char* argument;
    };
    static const Opcode kOpcodes[] = {
        {'I', "INT", "1\n"},
        {'L', "LONG", "1L\n"},
        {'F', "FLOAT", "1.5\n"},
        {'S', "STRING", "'a'\n"},
        {'V', "UNICODE", "a\n"},
        {'p', "PUT", "0\n"},
        {'g', "GET", "0\n"},
        {'P', "PERSID", "x\n"},
        {'i', "INST", "os\nsystem\n"},
        {'o', "OBJ", ""},
        {'l', "LIST", ""},
        {'d', "DICT", ""},
        {'0', "POP", ""},
        {'1', "POP_MARK", ""},
        {'2', "DUP", ""},
        {'T', "BINSTRING", ""},
        {'U', "SHORT_BINSTRING", ""},
        {'B', "BINBYTES", ""},
        {'C', "SHORT_BINBYTES", ""},
        {0x81, "NEWOBJ", ""},
        {0x82, "EXT1", "\x01"},
        {0x83, "EXT2", "\x01\x01"},
        {0x84, "EXT4", "\x01\x01"},
        {0x8B, "LONG4", ""},
        {0x8D, "BINUNICODE8", ""},
        {0x8E, "BINBYTES8", ""},
        {0x8F, "EMPTY_SET", ""},
        {0x90, "ADDITEMS", ""},
        {0x91, "FROZENSET", ""},
        {0x92, "NEWOBJ_EX", ""},
        {0x96, "BYTEARRAY8", ""},
        {0x97, "NEXT_BUFFER", ""},
        {0x98, "READONLY_BUFFER", ""},
    };
    std::vector<BadPickle> out;
    for (const Opcode& o : kOpcodes) {
        PickleWriter p = start().empty_dict().mark().none().op(o.code).raw(o.argument);
        out.push_back({std::string("opcode ") + o.name, p.raw(std::string(16, '\0')).out,
                       "opcode " + std::string(o.name) + " is not accepted"});
    }
    return out;
}

std::vector<BadPickle> forbidden_globals() {
    static const std::pair<const char*, const char*> kNames[] = {
        {"os", "system"},
        {"posix", "system"},
        {"nt", "system"},
        {"subprocess", "Popen"},
        {"subprocess", "check_output"},
        {"builtins", "eval"},
        {"builtins", "exec"},
        {"builtins", "getattr"},
        {"builtins", "__import__"},
        {"builtins", "open"},
        {"__builtin__", "eval"},
        {"importlib", "import_module"},
        {"runpy", "_run_code"},
        {"pty", "spawn"},
        {"socket", "create_connection"},
        {"shutil", "rmtree"},
        {"operator", "attrgetter"},
        {"operator", "methodcaller"},
        {"functools", "partial"},
        {"types", "FunctionType"},
        {"types", "CodeType"},
        {"code", "InteractiveInterpreter"},
        {"pickle", "loads"},
        {"_pickle", "Unpickler"},
        {"marshal", "loads"},
        {"ctypes", "CDLL"},
        {"webbrowser", "open"},
        {"sys", "exit"},
        {"pip", "main"},
        {"torch", "load"},
        {"torch.jit", "load"},
        {"torch.hub", "load"},
        {"torch.storage", "_load_from_bytes"},
        {"torch.storage", "UntypedStorage"},
        {"torch._utils", "_rebuild_tensor"},
        {"torch._utils", "_rebuild_sparse_tensor"},
        {"torch._utils", "_rebuild_qtensor"},
        {"torch._tensor", "_rebuild_from_type_v2"},
        {"torch", "Float8_e4m3fnStorage"},
        {"torch", "Tensor"},
        {"torch", "Size"},
        {"torch.nn.modules.linear", "Linear"},
        {"numpy.core.multiarray", "_reconstruct"},
        {"numpy", "dtype"},
        {"argparse", "Namespace"},
        {"collections", "defaultdict"},
        {"collections", "Counter"},
        {"copyreg", "_reconstructor"},
        {"_codecs", "encode"},
        {"tiktoken.core", "Encoding"},
        {"collections", "OrderedDict.__reduce__"},
        {"torch._utils", "_rebuild_tensor_v2.__globals__"},
        {"torch", "FloatStorage._new_shared"},
        {"torch", "FloatStorage "},
        {" collections", "OrderedDict"},
        {"Collections", "OrderedDict"},
        {"collections OrderedDict", ""},
        {"", "collections OrderedDict"},
        {"", ""},
    };
    std::vector<BadPickle> out;
    for (const auto& [module, name] : kNames) {
        const std::string dotted = std::string(module) + "." + name;
        out.push_back({"global " + dotted,
                       start().global(module, name).empty_tuple().reduce().stop().out,
                       "names \"" + dotted + "\""});
    }
    for (const auto& [module, name] : {kNames[0], kNames[5], kNames[34], kNames[49]}) {
        const std::string dotted = std::string(module) + "." + name;
        PickleWriter p = PickleWriter().proto(4).short_unicode(module).short_unicode(name);
        out.push_back(
            {"stack global " + dotted, p.stack_global().stop().out, "names \"" + dotted + "\""});
    }
    return out;
}

// collections.OrderedDict()
PickleWriter& ordered_dict(PickleWriter& p) {
    return p.global("collections", "OrderedDict").empty_tuple().reduce();
}

// The tuple of a storage, and BINPERSID.
PickleWriter& storage(PickleWriter& p, std::int64_t numel = 6, std::string_view key = "0",
                      std::string_view location = "cpu") {
    p.mark().unicode("storage").global("torch", "FloatStorage").unicode(key).unicode(location);
    return p.integer(numel).tuple().binpersid();
}

std::vector<BadPickle> wrong_targets() {
    const auto end = [](PickleWriter p) { return p.stop().out; };
    const auto tensor = [] {
        PickleWriter p = start();
        storage(p.global("torch._utils", "_rebuild_tensor_v2").mark());
        p.integer(0).integer(6).tuple1().integer(1).tuple1().new_false();
        ordered_dict(p).tuple().reduce();
        return p;
    };
    const auto od = [] {
        PickleWriter p = start();
        return ordered_dict(p);
    };
    const char* const no_dict = "SETITEM on what is no dict";
    const char* const no_list = "APPEND on what is no list";
    const char* const no_build = "BUILD on what is neither";
    const char* const no_call = "REDUCE on what is not callable";
    const char* const no_storage = "BINPERSID with something else";
    std::vector<BadPickle> out{
        {"SETITEM on a list", end(start().empty_list().none().none().setitem()), no_dict},
        {"SETITEM on a tuple", end(start().empty_tuple().none().none().setitem()), no_dict},
        {"SETITEM on None", end(start().none().none().none().setitem()), no_dict},
        {"SETITEM on an integer", end(start().binint1(1).none().none().setitem()), no_dict},
        {"SETITEM on text", end(start().unicode("a").none().none().setitem()), no_dict},
        {"SETITEM on a tensor", end(tensor().none().none().setitem()), no_dict},
        {"SETITEM on a global",
         end(start().global("collections", "OrderedDict").none().none().setitem()), no_dict},
        {"SETITEMS on a list", end(start().empty_list().mark().none().none().setitems()), no_dict},
        {"SETITEMS on a tensor", end(tensor().mark().none().none().setitems()), no_dict},
        {"SETITEMS with an odd count", end(start().empty_dict().mark().none().setitems()),
         "key without value"},
        {"APPEND on a dict", end(start().empty_dict().none().append()), no_list},
        {"APPEND on a tuple", end(start().empty_tuple().none().append()), no_list},
        {"APPEND on an OrderedDict", end(od().none().append()), no_list},
        {"APPEND on a tensor", end(tensor().none().append()), no_list},
        {"APPENDS on a dict", end(start().empty_dict().mark().none().appends()), no_list},
        {"APPENDS on text", end(start().unicode("x").mark().none().appends()), no_list},
        {"BUILD on a dict", end(start().empty_dict().empty_dict().build()), no_build},
        {"BUILD on a list", end(start().empty_list().empty_dict().build()), no_build},
        {"BUILD on a tuple", end(start().empty_tuple().empty_dict().build()), no_build},
        {"BUILD on a tensor", end(tensor().empty_dict().build()), no_build},
        {"BUILD on a global", end(start().global("torch", "FloatStorage").empty_dict().build()),
         no_build},
        {"BUILD with a list", end(od().empty_list().build()), no_build},
        {"BUILD with a tuple of two states", end(od().none().empty_dict().tuple2().build()),
         no_build},
        {"REDUCE on None", end(start().none().empty_tuple().reduce()), no_call},
        {"REDUCE on text", end(start().unicode("os.system").empty_tuple().reduce()), no_call},
        {"REDUCE on a storage class",
         end(start().global("torch", "FloatStorage").empty_tuple().reduce()), no_call},
        {"REDUCE on a tensor", end(tensor().empty_tuple().reduce()), no_call},
        {"REDUCE without a tuple",
         end(start().global("collections", "OrderedDict").empty_list().reduce()),
         "REDUCE without a tuple"},
        {"OrderedDict with arguments",
         end(start().global("collections", "OrderedDict").none().tuple1().reduce()),
         "OrderedDict with arguments"},
        {"BINPERSID of text", end(start().unicode("storage").binpersid()), no_storage},
        {"BINPERSID of a list", end(start().empty_list().binpersid()), no_storage},
        {"BINPERSID of an empty tuple", end(start().empty_tuple().binpersid()), no_storage},
    };
    return out;
}

// _rebuild_tensor_v2, _rebuild_parameter and storages with one argument of another type or number.
std::vector<BadPickle> wrong_arguments() {
    std::vector<BadPickle> out;
    static const char* const kRebuild[] = {"no storage",
                                           "text as offset",
                                           "a list as shape",
                                           "None as strides",
                                           "an integer as requires_grad",
                                           "a dict as hooks",
                                           "eight arguments",
                                           "five arguments",
                                           "text in the shape",
                                           "None in the strides"};
    for (int wrong = 0; wrong < 10; ++wrong) {
        PickleWriter p = start().global("torch._utils", "_rebuild_tensor_v2").mark();
        wrong == 0 ? p.none() : storage(p);
        wrong == 1 ? p.unicode("0") : p.integer(0);
        wrong == 2 ? p.empty_list() : wrong == 8 ? p.unicode("6").tuple1() : p.integer(6).tuple1();
        wrong == 3 ? p.none() : wrong == 9 ? p.none().tuple1() : p.integer(1).tuple1();
        wrong == 4 ? p.integer(0) : p.new_false();
        if (wrong == 5) p.empty_dict();
        if (wrong != 5 && wrong != 7) ordered_dict(p);
        if (wrong == 6) p.none().none();
        out.push_back({std::string("_rebuild_tensor_v2 with ") + kRebuild[wrong],
                       p.tuple().reduce().stop().out,
                       wrong >= 8   ? "shape or strides are not integers"
                       : wrong == 6 ? "more than 7 arguments"
                                    : "_rebuild_tensor_v2 with arguments of other types"});
    }
    for (int wrong = 0; wrong < 4; ++wrong) {
        PickleWriter p = start().global("torch._utils", "_rebuild_parameter");
        wrong == 0 ? p.none() : p.empty_dict();
        p.new_true();
        ordered_dict(p);
        wrong == 1 ? p.tuple2() : p.tuple3();
        if (wrong == 2) p.tuple1();
        if (wrong == 1) p = start().global("torch._utils", "_rebuild_parameter").empty_tuple();
        out.push_back({"_rebuild_parameter, form " + std::to_string(wrong), p.reduce().stop().out,
                       "_rebuild_parameter with arguments of other types"});
    }
    static const char* const kStorage[] = {"another first word",
                                           "bytes-like class name as text",
                                           "an OrderedDict as class",
                                           "_rebuild_tensor_v2 as class",
                                           "an integer as key",
                                           "None as location",
                                           "text as elements",
                                           "four members",
                                           "six members"};
    for (int wrong = 0; wrong < 9; ++wrong) {
        PickleWriter p = start().mark();
        p.unicode(wrong == 0 ? "module" : "storage");
        if (wrong == 1) p.unicode("FloatStorage");
        if (wrong == 2) p.global("collections", "OrderedDict");
        if (wrong == 3) p.global("torch._utils", "_rebuild_tensor_v2");
        if (wrong == 0 || wrong > 3) p.global("torch", "FloatStorage");
        wrong == 4 ? p.integer(0) : p.unicode("0");
        wrong == 5 ? p.none() : p.unicode("cpu");
        if (wrong == 6) p.unicode("6");
        if (wrong != 6 && wrong != 7) p.integer(6);
        if (wrong == 8) p.none();
        out.push_back({std::string("storage with ") + kStorage[wrong],
                       p.tuple().binpersid().stop().out, "BINPERSID with something else"});
    }
    return out;
}

std::vector<BadPickle> memo_stack_and_marks() {
    const auto end = [](PickleWriter p) { return p.stop().out; };
    const char* const few = "too few values on the stack";
    const char* const no_mark = "finds no mark";
    const char* const closed = "part of another one";
    PickleWriter many_marks = start().empty_list(), deep = start(), many_values = start();
    for (int i = 0; i < 65; ++i) many_marks.mark();
    for (int i = 0; i < 65537; ++i) deep.none();
    many_values.empty_list();
    for (int i = 0; i < 600; ++i) {
        many_values.mark();
        for (int j = 0; j < 1000; ++j) many_values.none();
        many_values.appends();
    }
    PickleWriter many_gets = start().none().binput(0);
    for (int i = 0; i < 65536; ++i) many_gets.binget(0);
    return {
        {"BINGET of an unset entry", end(start().binget(0)), "memo entry 0 was never set"},
        {"BINGET of a gap", end(start().none().binput(5).binget(3)), "memo entry 3 was never set"},
        {"LONG_BINGET far away", end(start().none().binput(0).long_binget(0x7FFFFFFF)),
         "memo entry 2147483647 was never set"},
        {"LONG_BINPUT far away", end(start().none().long_binput(0x7FFFFFFF)), "out of range"},
        {"LONG_BINPUT at the last index", end(start().none().long_binput(0xFFFFFFFF)),
         "out of range"},
        {"BINPUT of nothing", end(start().binput(0)), few},
        {"MEMOIZE of nothing", end(start().memoize()), few},
        {"STOP with nothing", end(start()), few},
        {"TUPLE1 of nothing", end(start().tuple1()), few},
        {"TUPLE3 of two", end(start().none().none().tuple3()), few},
        {"SETITEM with a key only", end(start().empty_dict().none().setitem()), "on the stack"},
        {"APPEND of nothing", end(start().empty_list().append()), few},
        {"REDUCE of nothing", end(start().reduce()), few},
        {"BUILD of nothing", end(start().build()), few},
        {"BINPERSID of nothing", end(start().binpersid()), few},
        {"STACK_GLOBAL of nothing", end(start().stack_global()), few},
        {"STACK_GLOBAL of integers", end(start().binint1(1).binint1(2).stack_global()),
         "without two names"},
        {"TUPLE without a mark", end(start().none().tuple()), no_mark},
        {"SETITEMS without a mark", end(start().empty_dict().setitems()), no_mark},
        {"APPENDS without a mark", end(start().empty_list().appends()), no_mark},
        {"a value from below the mark", end(start().empty_list().none().mark().append()), few},
        {"a value left on the stack", end(start().none().none()), "left on the stack"},
        {"a mark left on the stack", end(start().mark().none()), "left on the stack"},
        {"65 marks", many_marks.out, "more than 64 marks"},
        {"65,537 values on the stack", deep.out, "65,536 values on the stack"},
        {"65,537 values from the memo", many_gets.out, "65,536 values on the stack"},
        {"600,000 values", many_values.out, "more than 524,288 values"},
        {"a list that contains itself", end(start().empty_list().binput(0).binget(0).append()),
         "contains itself"},
        {"a dict that is its own value",
         end(start().empty_dict().binput(0).none().binget(0).setitem()), "contains itself"},
        {"a dict that is its own key",
         end(start().empty_dict().binput(0).binget(0).none().setitem()), "contains itself"},
        {"a list in a tuple in the list",
         end(start().empty_list().binput(0).binget(0).tuple1().append()), closed},
        {"two lists in each other",
         end(start().empty_list().binput(0).empty_list().binput(1).binget(0).append().append()),
         closed},
        {"BUILD of a dict with itself", end(start().empty_dict().binput(0).binget(0).build()),
         closed},
        {"a change after the end of building",
         end(start().empty_list().binput(0).tuple1().binget(0).none().append().tuple2()), closed},
    };
}

std::vector<BadPickle> lying_sizes() {
    const std::string proto = start().out;
    const auto with = [&](std::string_view s) { return proto + std::string(s); };
    return {
        {"nothing", "", "cut off"},
        {"PROTO alone", with(""), "cut off"},
        {"no STOP", with("}"), "cut off"},
        {"bytes after STOP", with("}.x"), "bytes after the end"},
        {"two pickles", with("}.") + with("}."), "bytes after the end"},
        {"protocol 0", PickleWriter().proto(0).empty_dict().stop().out, "protocol 0"},
        {"protocol 1", PickleWriter().proto(1).empty_dict().stop().out, "protocol 1"},
        {"protocol 6", PickleWriter().proto(6).empty_dict().stop().out, "protocol 6"},
        {"protocol 255", PickleWriter().proto(255).empty_dict().stop().out, "protocol 255"},
        {"PROTO twice", with("\x80\x02}."), "protocol 2"},
        {"BINUNICODE past the end", with(std::string_view("X\x10\0\0\0abc", 8)), "cut off"},
        {"BINUNICODE of 4 GiB", with("X\xFF\xFF\xFF\xFF") + "abc", "string of 4294967295 bytes"},
        {"BINUNICODE of 65,537 bytes", start().unicode(std::string(65537, 'a')).stop().out,
         "string of 65537 bytes"},
        {"BINUNICODE without a length", with("X\x01"), "cut off"},
        {"SHORT_BINUNICODE past the end",
         with("\x8C\x10"
              "abc"),
         "cut off"},
        {"text that is not UTF-8", start().unicode("\xFF").stop().out, "not UTF-8"},
        {"text with a surrogate", start().unicode("\xED\xA0\x80").stop().out, "not UTF-8"},
        {"LONG1 of 9 bytes", start().long1("123456789").stop().out, "more than 64 bits"},
        {"LONG1 of 255 bytes", start().long1(std::string(255, '\x7F')).stop().out,
         "more than 64 bits"},
        {"LONG1 past the end",
         with("\x8A\x08"
              "123"),
         "cut off"},
        {"BININT past the end", with("J\x01"), "cut off"},
        {"BININT2 past the end", with("M\x01"), "cut off"},
        {"BININT1 past the end", with("K"), "cut off"},
        {"BINFLOAT past the end", with("G1234"), "cut off"},
        {"LONG_BINPUT past the end", with("Nr\x01"), "cut off"},
        {"GLOBAL without an end", with("ccollections"), "name without end"},
        {"GLOBAL with one name", with("ccollections\nOrderedDict"), "name without end"},
        {"GLOBAL of 600 bytes", with("c" + std::string(600, 'a') + "\nb\n."), "name without end"},
        {"FRAME past the end", PickleWriter().proto(4).frame(100).empty_dict().stop().out,
         "frame reaches past the end"},
        {"FRAME of 2^64 - 1", PickleWriter().proto(4).frame(UINT64_MAX).empty_dict().stop().out,
         "frame reaches past the end"},
        {"FRAME without a length", with("\x95\x01"), "cut off"},
        {"17 MiB", std::string(std::size_t{17} << 20, 'N'), "larger than 16 MiB"},
    };
}

// ---- state dicts whose pickle is well-formed, but whose tensors are not

// What _rebuild_tensor_v2 is told about one tensor of 6 floats.
struct Claim {
    std::string key = "0", location = "cpu", name = "a", storage_class = "FloatStorage";
    std::int64_t numel = 6, offset = 0;
    std::vector<std::int64_t> shape{2, 3}, strides{3, 1};
};

void write_claim(PickleWriter& p, const Claim& c) {
    p.unicode(c.name).global("torch._utils", "_rebuild_tensor_v2").mark();
    p.mark().unicode("storage").global("torch", c.storage_class).unicode(c.key);
    p.unicode(c.location).integer(c.numel).tuple().binpersid().integer(c.offset);
    for (const auto* list : {&c.shape, &c.strides}) {
        p.mark();
        for (const std::int64_t n : *list) p.integer(n);
        p.tuple();
    }
    ordered_dict(p.new_false()).tuple().reduce();
}

std::string claims(const std::vector<Claim>& list) {
    PickleWriter p = start().empty_dict().mark();
    for (const Claim& c : list) write_claim(p, c);
    return p.setitems().stop().out;
}

// Reads names and places of the tensors of an archive with two storages of 24 bytes.
std::vector<nanogpt::detail::StoredTensor> read_tensors(const fs::path& file,
                                                        const std::string& pickle) {
    write_file(file, torch_zip("m", pickle, {std::string(24, 'a'), std::string(24, 'b')}).bytes());
    const ZipFile zip{nanogpt::File(file)};
    return nanogpt::detail::read_state_dict(zip);
}

struct BadClaim {
    std::string name;
    std::function<void(Claim&)> change;
    std::string reason;
};

const std::vector<BadClaim>& bad_claims() {
    constexpr std::int64_t kHuge = INT64_MAX;
    static const std::vector<BadClaim> cases{
        {"storage too short",
         [](Claim& c) {
             c.shape = {3, 3};
         },
         "reaches past its storage"},
        {"offset past the storage", [](Claim& c) { c.offset = 1; }, "reaches past its storage"},
        {"offset far past the storage", [](Claim& c) { c.offset = kHuge; },
         "reaches past its storage"},
        {"negative offset", [](Claim& c) { c.offset = -1; }, "negative size or offset"},
        {"negative elements", [](Claim& c) { c.numel = -6; }, "negative size or offset"},
        {"a part of the storage",
         [](Claim& c) {
             c.shape = {1, 3};
         },
         "only a part of its storage"},
        {"the end of the storage",
         [](Claim& c) {
             c.shape = {1, 3};
             c.offset = 3;
         },
         "only a part of its storage"},
        {"more elements than the entry",
         [](Claim& c) {
             c.numel = 7;
             c.shape = {7};
             c.strides = {1};
         },
         "its entry has 24 bytes"},
        {"fewer elements than the entry",
         [](Claim& c) {
             c.numel = 3;
             c.shape = {1, 3};
         },
         "its entry has 24 bytes"},
        {"2^62 elements",
         [](Claim& c) {
             c.numel = std::int64_t{1} << 62;
             c.shape = {c.numel};
             c.strides = {1};
         },
         "passes 64 bits"},
        {"3 * 2^62 elements",
         [](Claim& c) {
             c.shape = {std::int64_t{1} << 62, 3};
             c.strides = {3, 1};
         },
         "reaches past its storage"},
        {"negative dimension",
         [](Claim& c) {
             c.shape = {-2, -3};
         },
         "negative dimension -2"},
        {"dimensions past 64 bits",
         [](Claim& c) {
             c.shape = {kHuge, kHuge};
         },
         "passes 64 bits"},
        {"a zero hides an overflow",
         [](Claim& c) {
             c.shape = {kHuge, kHuge, 0};
             c.strides = {1, 1, 1};
         },
         "passes 64 bits"},
        {"negative stride",
         [](Claim& c) {
             c.strides = {-3, 1};
         },
         "negative stride"},
        {"transposed",
         [](Claim& c) {
             c.strides = {1, 2};
         },
         "not contiguous"},
        {"expanded by stride 0",
         [](Claim& c) {
             c.strides = {0, 1};
         },
         "not contiguous"},
        {"every second",
         [](Claim& c) {
             c.strides = {6, 2};
         },
         "not contiguous"},
        {"huge stride",
         [](Claim& c) {
             c.strides = {kHuge, 1};
         },
         "not contiguous"},
        {"fewer strides", [](Claim& c) { c.strides = {1}; }, "different lengths"},
        {"more strides",
         [](Claim& c) {
             c.strides = {3, 1, 1};
         },
         "different lengths"},
        {"five dimensions",
         [](Claim& c) {
             c.shape = {1, 1, 1, 2, 3};
             c.strides = {6, 6, 6, 3, 1};
         },
         "dimensions"},
        {"no such entry", [](Claim& c) { c.key = "7"; }, "no entry data/7"},
        {"a key with a slash", [](Claim& c) { c.key = "../0"; }, "storage key \"../0\""},
        {"an empty key", [](Claim& c) { c.key = ""; }, "storage key \"\""},
        {"a key of letters", [](Claim& c) { c.key = "zero"; }, "storage key \"zero\""},
        {"a negative key", [](Claim& c) { c.key = "-1"; }, "storage key \"-1\""},
        {"device meta", [](Claim& c) { c.location = "meta"; }, "without data"},
        {"the element type does not fit", [](Claim& c) { c.storage_class = "DoubleStorage"; },
         "its entry has 24 bytes"},
        {"half of the storage's type", [](Claim& c) { c.storage_class = "HalfStorage"; },
         "its entry has 24 bytes"},
    };
    return cases;
}

std::vector<BadPickle> bad_dicts() {
    Claim other;
    other.name = "b";
    Claim shifted = other;
    shifted.shape = {1, 3};
    shifted.offset = 3;
    Claim prefixed;
    prefixed.name = "_orig_mod.a";
    PickleWriter laughs = start().empty_dict().unicode("lol").empty_tuple();
    for (int i = 0; i < 60; ++i) laughs.binput(0).binget(0).binget(0).tuple3();
    return {
        {"one name twice", claims({Claim{}, Claim{}}), "two tensors \"a\""},
        {"one name with and without prefix", claims({Claim{}, prefixed}), "two tensors \"a\""},
        {"two tensors in parts of one storage", claims({Claim{}, shifted}), "storage"},
        {"a name that is no text", start().empty_dict().binint1(1).none().setitem().stop().out,
         "no string"},
        {"a value that is no tensor",
         start().empty_dict().unicode("a").binint1(1).setitem().stop().out, "is no tensor"},
        {"a dict in the dict",
         start().empty_dict().unicode("model").empty_dict().setitem().stop().out, "is no tensor"},
        {"3^60 members out of 60 tuples", laughs.setitem().stop().out, "is no tensor"},
        {"a list", start().empty_list().stop().out, "no dict of tensors"},
        {"None", start().none().stop().out, "no dict of tensors"},
        {"a single tensor",
         [] {
             PickleWriter p = start().mark();
             write_claim(p, Claim{});
             return p.tuple().stop().out;
         }(),
         "no dict of tensors"},
    };
}

}  // namespace

TEST_CASE("pickle: fixture A, a genuine state dict, is read with exact values") {
    TempDir dir;
    const std::string file = from_base64(kFixtureA);
    REQUIRE(file.size() == 2045);
    write_file(dir / "a.pt", file);
    const ZipFile zip{nanogpt::File(dir / "a.pt")};
    const auto tensors = nanogpt::detail::read_state_dict(zip);  // sorted by name
    REQUIRE(tensors.size() == 4);
    const auto values = [&](std::size_t i) {
        const auto bytes = zip.read(*tensors[i].entry, 4096);
        std::vector<float> out;
        const std::size_t size = nanogpt::size_of(tensors[i].info.dtype);
        for (std::size_t at = 0; at < bytes.size(); at += size) {
            std::uint32_t x = 0;
            for (std::size_t k = size; k-- > 0;) x = x << 8 | std::uint32_t(bytes[at + k]);
            out.push_back(size == 2 ? from_bf16(std::uint16_t(x)) : std::bit_cast<float>(x));
        }
        return out;
    };
    const auto sum = [](const std::vector<float>& x) {
        double s = 0;
        for (const float v : x) s += double{v};
        return static_cast<float>(s);
    };
    CHECK(tensors[0].info.name == "lm_head.weight");
    CHECK(tensors[0].info.shape == std::vector<std::int64_t>{8, 4});
    CHECK(close(values(0)[0], -0.015563071f, 1e-9));
    CHECK(close(values(0)[3], 0.220775485f, 1e-9));
    CHECK(close(sum(values(0)), -0.912716925f, 1e-7));
    CHECK(tensors[1].info.name == "resid_lambdas");
    CHECK(same_bits(values(1), std::vector<float>{1, 1}));
    CHECK(tensors[2].info.name == "transformer.h.0.weight");
    CHECK(close(values(2)[1], -0.259148359f, 1e-9));
    CHECK(close(sum(values(2)), 0.555551529f, 1e-7));
    CHECK(tensors[3].info.name == "transformer.wte.weight");
    CHECK(tensors[3].info.dtype == DType::bf16);
    const std::vector<float> first{-1.359375f, 0.56640625f, -0.8203125f, -1.203125f};
    CHECK(same_bits(std::span<const float>(values(3)).first(4), first));
    CHECK(close(sum(values(3)), -0.638427734375f, 1e-9));
}

TEST_CASE("pickle: fixture A has the records, sizes, checksums and offsets of its torch") {
    TempDir dir;
    write_file(dir / "a.pt", from_base64(kFixtureA));
    const ZipFile zip{nanogpt::File(dir / "a.pt")};
    const struct {
        std::string name;
        std::uint64_t size;
        std::uint32_t crc;
    } want[] = {{"data.pkl", 631, 0xC0D1BE85}, {"data/0", 8, 0xD5065190},
                {"data/1", 64, 0x409515F9},    {"data/2", 64, 0xB208AAAB},
                {"data/3", 128, 0x6EB6B3B9},   {"version", 2, 0x55679ED1}};
    CHECK(zip.entries().size() == std::size(want));
    for (const auto& w : want) {
        CAPTURE(w.name);
        const auto* entry = zip.find("model_000010/" + w.name);
        REQUIRE(entry != nullptr);
        CHECK(entry->size == w.size);
        CHECK(entry->crc == w.crc);
        CHECK(entry->offset % 64 == 0);
    }
    CHECK(zip.find("model_000010/data.pkl")->offset == 64);
}

TEST_CASE("pickle: fixture B, a genuine dict of views, is read as offsets and strides") {
    TempDir dir;
    const std::string file = from_base64(kFixtureB);
    REQUIRE(file.size() == 2061);
    write_file(dir / "views.pt", file);
    const ZipFile zip{nanogpt::File(dir / "views.pt")};
    const auto bytes = zip.read(*zip.find("views/data.pkl"), 4096);
    const PickleTree tree = parse_pickle(bytes, PickleFor::checkpoint);
    const PickleValue& root = tree[tree.root];
    REQUIRE(root.kind == PickleKind::dict);
    const struct {
        std::string name, storage_class, key;
        std::int64_t offset;
        std::vector<std::int64_t> shape, strides;
    } want[] = {{"a", "torch IntStorage", "0", 2, {4}, {1}},
                {"b", "torch IntStorage", "0", 0, {10}, {1}},
                {"h", "torch HalfStorage", "1", 0, {10}, {1}},
                {"c", "torch IntStorage", "0", 0, {5, 2}, {1, 5}},
                {"bool", "torch BoolStorage", "2", 0, {10}, {1}},
                {"f64", "torch DoubleStorage", "3", 0, {10}, {1}},
                {"i64", "torch LongStorage", "4", 0, {10}, {1}}};
    REQUIRE(root.items.size() == 2 * std::size(want));
    const auto integers = [&](std::uint32_t i) {
        std::vector<std::int64_t> out;
        for (const std::uint32_t item : tree[i].items) out.push_back(tree[item].integer);
        return out;
    };
    for (std::size_t i = 0; i < std::size(want); ++i) {
        CAPTURE(want[i].name);
        CHECK(tree[root.items[2 * i]].text == want[i].name);
        const PickleValue& tensor = tree[root.items[2 * i + 1]];
        REQUIRE(tensor.kind == PickleKind::tensor);
        const PickleValue& storage = tree[tensor.items[0]];
        REQUIRE(storage.kind == PickleKind::storage);
        CHECK(tree[storage.items[1]].text == want[i].storage_class);
        CHECK(tree[storage.items[2]].text == want[i].key);
        CHECK(tree[storage.items[4]].integer == 10);
        CHECK(tree[tensor.items[1]].integer == want[i].offset);
        CHECK(integers(tensor.items[2]) == want[i].shape);
        CHECK(integers(tensor.items[3]) == want[i].strides);
    }
    // as a checkpoint it is refused: its first tensor is a view
    const std::string why = error_of([&] { nanogpt::detail::read_state_dict(zip); });
    CHECK(contains(why, "only a part of its storage"));
}

TEST_CASE("pickle: every value is read as it was written") {
    PickleWriter p = start().mark();
    const std::int64_t integers[] = {0,
                                     1,
                                     255,
                                     256,
                                     65535,
                                     65536,
                                     -1,
                                     INT32_MIN,
                                     INT32_MAX,
                                     std::int64_t{1} << 31,
                                     -(std::int64_t{1} << 40),
                                     INT64_MAX,
                                     INT64_MIN,
                                     128,
                                     -129};
    for (const std::int64_t x : integers) p.integer(x);
    p.binfloat(-1.5).new_true().new_false().none().unicode("h\xC3\xA9").short_unicode("s");
    p.long1("").empty_list().mark().none().none().appends().tuple().stop();
    const PickleTree tree = parse(p.out);
    const PickleValue& root = tree[tree.root];
    REQUIRE(root.kind == PickleKind::tuple);
    constexpr std::size_t n = std::size(integers);
    REQUIRE(root.items.size() == n + 8);
    for (std::size_t i = 0; i < n; ++i) CHECK(tree[root.items[i]].integer == integers[i]);
    CHECK(tree[root.items[n]].real == -1.5);
    CHECK(tree[root.items[n + 1]].kind == PickleKind::boolean);
    CHECK(tree[root.items[n + 1]].integer == 1);
    CHECK(tree[root.items[n + 2]].integer == 0);
    CHECK(tree[root.items[n + 3]].kind == PickleKind::none);
    CHECK(tree[root.items[n + 4]].text == "h\xC3\xA9");
    CHECK(tree[root.items[n + 5]].text == "s");
    CHECK(tree[root.items[n + 6]].integer == 0);
    CHECK(tree[root.items[n + 7]].items.size() == 2);
}

TEST_CASE("pickle: memo indices may be sparse, and frames may end anywhere") {
    PickleWriter p = PickleWriter().proto(4).frame(3).none().long_binput(7).frame(2);
    p.long_binget(7).tuple2().stop();
    const PickleTree tree = parse(p.out);
    CHECK(tree[tree.root].items.size() == 2);
    CHECK(tree[tree.root].items[0] == tree[tree.root].items[1]);
}

TEST_CASE("pickle: a parameter counts as its tensor, and a 7th argument is ignored") {
    PickleWriter p = start().global("torch._utils", "_rebuild_parameter");
    storage(p.global("torch._utils", "_rebuild_tensor_v2").mark());
    p.integer(0).integer(6).tuple1().integer(1).tuple1().new_true();
    ordered_dict(p).empty_dict().tuple().reduce().new_true();
    ordered_dict(p).tuple3().reduce().stop();
    const PickleTree tree = parse(p.out);
    CHECK(tree[tree.root].kind == PickleKind::tensor);
}

TEST_CASE("pickle: a refused opcode is named with its offset") {
    const std::string p = start().empty_dict().mark().none().op('i').raw("os\nsystem\n").out;
    try {
        parse(p);
        FAIL("not refused");
    } catch (const nanogpt::Error& e) {
        CHECK(e.kind == nanogpt::ErrorKind::refused);
        CHECK(e.offset == 5);
        CHECK(contains(e.what(), "INST"));
        CHECK(contains(e.what(), "at byte 5"));
    }
}

TEST_CASE("pickle: a GLOBAL outside the allow-list is refused, with its offset") {
    const std::string p = start().global("os", "system").unicode("id").tuple1().reduce().stop().out;
    try {
        parse(p);
        FAIL("not refused");
    } catch (const nanogpt::Error& e) {
        CHECK(e.offset == 2);
        CHECK(contains(e.what(), "\"os.system\""));
    }
}

TEST_CASE("pickle: every byte that is no known opcode is refused, for checkpoints and tokenizers") {
    const std::string checkpoint =
        "\x80\x95.(}])t\x85\x86\x87N\x88\x89JKM\x8AGX\x8Cqr\x94hjc\x93Rb"
        "Qsuae";
    const std::string tokenizer = checkpoint + "BC\x81";
    for (const auto what : {PickleFor::checkpoint, PickleFor::tokenizer}) {
        for (int op = 0; op < 256; ++op) {
            std::string allowed = what == PickleFor::checkpoint ? checkpoint : tokenizer;
            if (what == PickleFor::tokenizer)
                std::erase_if(allowed, [](char c) { return c == 'R' || c == 'Q'; });
            if (allowed.find(static_cast<char>(op)) != std::string::npos) continue;
            CAPTURE(op);
            const std::string p = start().empty_dict().op(op).raw(std::string(16, '\0')).out;
            CHECK(contains(error_of([&] { parse(p, what); }), "is not accepted"));
        }
    }
}

TEST_CASE("pickle: every truncation of a genuine state dict is refused") {
    const std::string file = from_base64(kFixtureA);
    const std::string pickle = file.substr(64, 631);
    for (std::size_t n = 0; n < pickle.size(); ++n) {
        CAPTURE(n);
        CHECK(error_of([&] { parse(std::string_view(pickle).substr(0, n)); }) != "");
    }
    CHECK(error_of([&] { parse(pickle); }) == "");
}

TEST_CASE("pickle: A2, every hostile program is refused for its own reason") {
    TempDir dir;
    const std::string good = claims({Claim{}});
    std::size_t total = 0, passed = 0;
    const auto check = [&](const std::string& name, const std::string& why,
                           const std::string& want) {
        CAPTURE(name);
        CHECK_MESSAGE(contains(why, want), "refused with: ", why);
        ++total;
        passed += contains(why, want);
    };
    for (const auto& table : {forbidden_opcodes(), forbidden_globals(), wrong_targets(),
                              wrong_arguments(), memo_stack_and_marks(), lying_sizes()}) {
        for (const BadPickle& bad : table) {
            check(bad.name, error_of([&] { parse(bad.pickle); }), bad.reason);
            CHECK(error_of([&] { parse(good); }) == "");
        }
    }
    for (const BadClaim& bad : bad_claims()) {
        Claim claim;
        bad.change(claim);
        check(bad.name, error_of([&] { read_tensors(dir / "m.pt", claims({claim})); }), bad.reason);
        CHECK(read_tensors(dir / "m.pt", good).size() == 1);
    }
    for (const BadPickle& bad : bad_dicts()) {
        check(bad.name, error_of([&] { read_tensors(dir / "m.pt", bad.pickle); }), bad.reason);
        CHECK(read_tensors(dir / "m.pt", good).size() == 1);
    }
    CHECK(total >= 128);
    report("A2", passed, total);
}

TEST_CASE("pickle: two tensors may share a storage if they are the same") {
    TempDir dir;
    Claim twin;
    twin.name = "b";
    CHECK(read_tensors(dir / "m.pt", claims({Claim{}, twin})).size() == 2);
}
