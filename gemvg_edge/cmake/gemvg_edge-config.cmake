# find_package(gemvg_edge CONFIG REQUIRED), with -Dgemvg_edge_DIR=$(python -m gemvg_edge.config --cmake-dir)
#
#   gemvg_edge::gemvg_edge   gemvg_edge.hpp and the Python below it, for C++17
#   gemvg_edge::c            the same with gemvg_edge.h compiled, for C; a library of your build
#
# The Python is -DPython_EXECUTABLE=.., or else the one that this file is installed in, or an active environment's; it
# needs its development files, and pybind11: pip install 'gemvg-edge[cpp]'. CMake 3.18 or newer.
cmake_policy(PUSH)
cmake_policy(VERSION 3.18)

if(TARGET gemvg_edge::gemvg_edge)
  cmake_policy(POP)
  return()
endif()

get_property(gemvg_edge_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
if(NOT CXX IN_LIST gemvg_edge_languages)
  message(FATAL_ERROR "gemvg_edge is written in C++; let the project have it too: project(NAME LANGUAGES C CXX)")
endif()

# lib/pythonX.Y/site-packages/gemvg_edge/cmake -> bin, or .venv/bin of a checkout; where this gemvg_edge is.
get_filename_component(gemvg_edge_folder ${CMAKE_CURRENT_LIST_DIR}/.. REALPATH)
foreach(gemvg_edge_place ../../../../bin/python3 ../.venv/bin/python)
  if(NOT Python_EXECUTABLE)
    get_filename_component(gemvg_edge_place ${CMAKE_CURRENT_LIST_DIR}/../${gemvg_edge_place} ABSOLUTE)
    execute_process(
      COMMAND ${gemvg_edge_place} -c "import gemvg_edge.config; print(gemvg_edge.config.FOLDER)"
      WORKING_DIRECTORY ${CMAKE_CURRENT_LIST_DIR}  # of no other gemvg_edge
      OUTPUT_VARIABLE gemvg_edge_found ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(gemvg_edge_found STREQUAL gemvg_edge_folder)
      set(Python_EXECUTABLE ${gemvg_edge_place})
    endif()
  endif()
endforeach()
find_package(Python REQUIRED COMPONENTS Interpreter Development.Embed)

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import gemvg_edge, sys; print(sys.executable)"
  WORKING_DIRECTORY ${CMAKE_CURRENT_LIST_DIR}
  RESULT_VARIABLE gemvg_edge_failed OUTPUT_VARIABLE gemvg_edge_python ERROR_VARIABLE gemvg_edge_said
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(gemvg_edge_failed)
  message(FATAL_ERROR "${Python_EXECUTABLE} cannot import gemvg_edge; give the Python that it is installed in, such as "
    "-DPython_EXECUTABLE=/venv/bin/python\n${gemvg_edge_said}")
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pybind11; print(pybind11.get_include())"
  RESULT_VARIABLE gemvg_edge_failed OUTPUT_VARIABLE gemvg_edge_pybind11 ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
if(gemvg_edge_failed)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no pybind11; run `pip install 'gemvg-edge[cpp]'` with it")
endif()

# No imported target is linked: those are known in the folder that found them alone, and ours everywhere.
add_library(gemvg_edge INTERFACE)
add_library(gemvg_edge::gemvg_edge ALIAS gemvg_edge)
get_filename_component(gemvg_edge_headers ${CMAKE_CURRENT_LIST_DIR}/../include ABSOLUTE)
target_compile_features(gemvg_edge INTERFACE cxx_std_17)
target_compile_options(gemvg_edge INTERFACE -pthread)
target_compile_definitions(gemvg_edge INTERFACE GEMVG_PYTHON="${gemvg_edge_python}")
target_include_directories(gemvg_edge INTERFACE ${gemvg_edge_headers})
target_include_directories(gemvg_edge SYSTEM INTERFACE ${gemvg_edge_pybind11} ${Python_INCLUDE_DIRS})
target_link_libraries(gemvg_edge INTERFACE ${Python_LIBRARIES} ${CMAKE_DL_LIBS})
target_link_options(gemvg_edge INTERFACE -pthread)
foreach(gemvg_edge_place ${Python_RUNTIME_LIBRARY_DIRS} ${Python_LIBRARY_DIRS})  # also once it is installed
  target_link_options(gemvg_edge INTERFACE -Wl,-rpath,${gemvg_edge_place})
endforeach()

add_library(gemvg_edge_c STATIC EXCLUDE_FROM_ALL ${gemvg_edge_headers}/gemvg_edge.cpp)
add_library(gemvg_edge::c ALIAS gemvg_edge_c)
set_target_properties(gemvg_edge_c PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_include_directories(gemvg_edge_c INTERFACE ${gemvg_edge_headers})
target_link_libraries(gemvg_edge_c PRIVATE gemvg_edge)

cmake_policy(POP)
