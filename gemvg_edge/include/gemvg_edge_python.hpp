// What is below gemvg_edge.hpp: Python within this process, its lock, its errors. Not to be included by itself.
//
// Python starts at the first use, as the one of a virtual environment would: GEMVG_PYTHON names its program. It takes
// no signal, reads no command line, leaves the locale alone, and stays until the process ends. A Python that the host
// started itself is used and left alone. Knows no pictures and no boxes.
#pragma once

#include <pybind11/embed.h>

#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace gemvg {

class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class TimedOut : public Error {
  public:
    using Error::Error;
};

class Cancelled : public Error {
  public:
    using Error::Error;
};

namespace detail __attribute__((visibility("hidden"))) {  // as pybind11's names are, which it uses
namespace py = pybind11;

// What the process has of Python. Never destroyed: threads may still ask while the process ends.
struct Python {
    std::mutex mutex;
    std::atomic<bool> running{false};
    bool ours = false;    // started here, not by the host
    pid_t born = 0;       // the process that it runs in
    std::string program;  // as `use_python` chose it
    std::string failed;   // why it could not start: there is no second try
};

inline Python& python() {
    static Python& one = *new Python;
    return one;
}

class Gil {
  public:
    Gil() : state_(PyGILState_Ensure()) {}
    ~Gil() { PyGILState_Release(state_); }
    Gil(const Gil&) = delete;
    Gil& operator=(const Gil&) = delete;

  private:
    const PyGILState_STATE state_;
};

// Python's lock let go while the host's own code runs.
class Released {
  public:
    Released() : state_(PyEval_SaveThread()) {}
    ~Released() { PyEval_RestoreThread(state_); }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

  private:
    PyThreadState* const state_;
};

// False in a forked child, which has none of Python's threads, and once the host ended a Python of its own.
inline bool usable() noexcept {
    const Python& one = python();
    return one.running.load(std::memory_order_acquire) && Py_IsInitialized() && (!one.ours || one.born == getpid());
}

// Python is never finalised (numpy cannot be imported a second time, and threads may still be inside), so this is all
// that is left to do at the end.
inline void flush() noexcept {
    if (!usable()) return;
    const Gil gil;
    for (const char* name : {"stdout", "stderr"}) {
        PyObject* const stream = PySys_GetObject(name);
        PyObject* const done = stream && stream != Py_None ? PyObject_CallMethod(stream, "flush", nullptr) : nullptr;
        if (!done) PyErr_Clear();
        Py_XDECREF(done);
    }
}

#ifdef GEMVG_PYTHON  // with quotes or, as make's shell leaves it, without
#define GEMVG_TEXT_OF(x) #x
#define GEMVG_TEXT(x) GEMVG_TEXT_OF(x)
inline std::string built_for() {
    const std::string path = GEMVG_TEXT(GEMVG_PYTHON);
    return path.front() == '"' ? path.substr(1, path.size() - 2) : path;
}
#else
inline std::string built_for() { return ""; }
#endif

inline std::string chosen_program(const Python& one) {
    if (!one.program.empty()) return one.program;
    const char* const told = std::getenv("GEMVG_PYTHON");
    return told && *told ? told : built_for();
}

constexpr const char* WHICH = "the Python that gemvg_edge is installed in, such as /venv/bin/python";

inline void launch(Python& one) {
    const std::string program = chosen_program(one);
    const std::string fix = std::string("; set GEMVG_PYTHON to ") + WHICH;
    std::error_code none;
    const bool is_path = program.find('/') != std::string::npos;
    if (is_path && (access(program.c_str(), X_OK) != 0 || std::filesystem::is_directory(program, none)))
        throw Error(program + " is no program that can be started" + fix);
    PyPreConfig before;
    PyPreConfig_InitPythonConfig(&before);
    before.parse_argv = before.configure_locale = before.coerce_c_locale = 0;  // the locale stays the host's
    before.utf8_mode = 1;
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.parse_argv = config.install_signal_handlers = config.pathconfig_warnings = 0;
    struct sigaction interrupt;
    sigaction(SIGINT, nullptr, &interrupt);
    PyStatus status = Py_PreInitialize(&before);
    if (!PyStatus_Exception(status) && !program.empty())
        status = PyConfig_SetBytesString(&config, &config.program_name, program.c_str());
    try {
        if (PyStatus_Exception(status)) throw std::runtime_error(status.err_msg ? status.err_msg : "its configuration");
        py::initialize_interpreter(&config, 0, nullptr, false);
    } catch (const std::exception& error) {
        one.failed = "Python cannot start (" + std::string(error.what()) + "); take PYTHONHOME away if it is set" + fix;
        throw Error(one.failed);
    }
    // The first import of `signal` takes Ctrl-C whatever the configuration says; so this is it.
    if (PyObject* const module = PyImport_ImportModule("signal"))
        Py_DECREF(module);
    else
        PyErr_Clear();
    sigaction(SIGINT, &interrupt, nullptr);
    // A host that is itself a plugin may have loaded libpython for itself alone, and numpy looks for it among all.
    Dl_info found;
    if (dladdr(reinterpret_cast<void*>(PyLong_Type.tp_repr), &found) && found.dli_fname)
        dlopen(found.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    one.ours = true, one.born = getpid();
    std::atexit([] { flush(); });
    PyEval_SaveThread();
}

inline void start() {
    Python& one = python();
    if (!one.running.load(std::memory_order_acquire)) {
        const std::lock_guard<std::mutex> lock(one.mutex);
        if (!one.failed.empty()) throw Error(one.failed);
        if (!one.running) {
            if (!Py_IsInitialized()) launch(one);
            one.running = true;
        }
    }
    if (usable()) return;
    if (Py_IsInitialized())
        throw Error("this process was forked from one in which Python runs; use gemvg in one of both alone");
    throw Error("Python was ended by this program; keep it until gemvg is no longer used");
}

// Text for Python, and Python's for us: UTF-8 both ways.
inline py::object utf8(const std::string& text, const char* name) {
    PyObject* const made = PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(text.size()), nullptr);
    if (made) return py::reinterpret_steal<py::object>(made);
    PyErr_Clear();
    throw Error(std::string(name) + " is not UTF-8; convert it");
}

inline std::string text(py::handle value) {
    const auto bytes =
        py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(value.ptr(), "utf-8", "backslashreplace"));
    if (!bytes) throw py::error_already_set();
    return {PyBytes_AS_STRING(bytes.ptr()), std::size_t(PyBytes_GET_SIZE(bytes.ptr()))};
}

inline std::string said(const py::error_already_set& error) {
    const auto words = py::reinterpret_steal<py::object>(PyObject_Str(error.value().ptr()));
    if (words) return text(words);
    PyErr_Clear();
    return "an error without words";
}

inline std::string named(const py::error_already_set& error) {
    return std::string(reinterpret_cast<PyTypeObject*>(error.type().ptr())->tp_name) + ": " + said(error);
}

// What is used of Python, found once and kept.
struct Names {
    py::object grounder, box, event, asarray, error, timed_out, cancelled;
};

inline const Names& names() {
    static std::atomic<Names*> found{nullptr};
    if (const Names* const known = found.load(std::memory_order_acquire)) return *known;
    try {
        const py::module_ package = py::module_::import("gemvg_edge");
        auto mine = std::make_unique<Names>(Names{
            package.attr("Grounder"), package.attr("Box"), py::module_::import("threading").attr("Event"),
            py::module_::import("numpy").attr("asarray"), package.attr("GemvgError"), package.attr("TimedOut"),
            package.attr("Cancelled")});
        Names* expected = nullptr;  // another thread may have come first while this one imported
        if (found.compare_exchange_strong(expected, mine.get())) return *mine.release();
        return *expected;
    } catch (const py::error_already_set& error) {
        PyObject* const program = PySys_GetObject("executable");
        const std::string by = program && PyUnicode_Check(program) ? text(program) : "this Python";
        throw Error("gemvg_edge cannot be imported by " + by + " (" + named(error) +
                    "); set GEMVG_PYTHON to " + WHICH);
    }
}

[[noreturn]] inline void throw_ours(const py::error_already_set& error) {
    if (error.matches(names().timed_out)) throw TimedOut(said(error));
    if (error.matches(names().cancelled)) throw Cancelled(said(error));
    throw Error(error.matches(names().error) ? said(error) : named(error));
}

// Some work that uses Python; whatever it raises becomes an Error.
template <class Work>
auto inside(const Work& work) {
    start();
    const Gil gil;
    try {
        return work(names());
    } catch (const py::error_already_set& error) {
        throw_ours(error);
    } catch (const Error&) {
        throw;
    } catch (const std::runtime_error& error) {  // pybind11's own
        throw Error(error.what());
    }
}

using Handle = std::shared_ptr<PyObject>;

inline Handle keep(py::object object) {
    return Handle(object.release().ptr(), [](PyObject* held) noexcept {
        if (!held || !usable()) return;
        const Gil gil;
        Py_DECREF(held);
    });
}

inline py::handle held(const Handle& handle, const char* what) {
    if (!handle) throw Error(std::string("this ") + what + " was moved from; use the one it was moved to");
    return handle.get();
}

template <class Value>
void give(py::dict& named, const char* name, const std::optional<Value>& value) {
    if (value) named[name] = *value;
}
}  // namespace detail

// The Python to start, before anything else is used: it goes before the environment's GEMVG_PYTHON, and that before the
// one that this program was built for.
inline void use_python(const std::filesystem::path& program) {
    detail::Python& one = detail::python();
    const std::lock_guard<std::mutex> lock(one.mutex);
    if (one.running || !one.failed.empty())
        throw Error("Python was started already; call use_python before everything else");
    one.program = program.string();
}

}  // namespace gemvg
