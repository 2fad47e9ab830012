# What the wheel of llama-cpp-python carries (KVTC_WHEEL), as the install component "wheel": the patched libraries, the tools that the
# console scripts start, and the headers that kvtc_gguf.native reads. `make wheel` hands this project to scikit-build-core.
set(wheel_libraries ggml-base ggml-cpu ggml-cuda ggml llama llama-common mtmd
    llama-server-impl llama-cli-impl llama-bench-impl llama-perplexity-impl)
set(wheel_tools llama-server llama-cli llama-bench llama-perplexity)

# CUDA's own libraries are not in the wheel. From CUDA 13 on, PyPI's packages put them where it looks, and build_wheel.py reads here
# which ones it asks for; before, they are the system's. A newer minor version serves what an older one was compiled for.
set(beside "$ORIGIN")
set(requirements "")
if(TARGET ggml-cuda)
    find_package(CUDAToolkit REQUIRED)
    if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CUDAToolkit_VERSION_MAJOR GREATER_EQUAL 13)
        list(APPEND beside "$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib")
        foreach(package nvidia-cuda-runtime nvidia-cublas)
            string(APPEND requirements "${package}~=${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}\n")
        endforeach()
    endif()
endif()
file(WRITE "${CMAKE_BINARY_DIR}/wheel-requirements.txt" "${requirements}")

foreach(target ${wheel_libraries})
    if(NOT TARGET ${target})
        continue()
    endif()
    # A wheel holds no links: with versions in the names every library would be in it three times.
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "${beside}" BUILD_WITH_INSTALL_RPATH ON)
    install(TARGETS ${target} COMPONENT wheel
        LIBRARY DESTINATION llama_cpp/lib RUNTIME DESTINATION llama_cpp/lib ARCHIVE DESTINATION llama_cpp/lib)
endforeach()

foreach(target ${wheel_tools})
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib" BUILD_WITH_INSTALL_RPATH ON)
    install(TARGETS ${target} COMPONENT wheel RUNTIME DESTINATION llama_cpp/bin)
endforeach()

if(TARGET ggml-cuda AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # libggml-cuda.so names no folder of this machine, and a toolkit need not lie where the linker looks.
    foreach(library cublas cudart)
        get_target_property(file CUDA::${library} IMPORTED_LOCATION)
        get_filename_component(folder "${file}" DIRECTORY)
        foreach(target ${wheel_tools} llama-completion)
            target_link_options(${target} PRIVATE "LINKER:-rpath-link,${folder}")
        endforeach()
    endforeach()
endif()

install(FILES "${CMAKE_SOURCE_DIR}/ggml_kvtc/kvtc.h" "${CMAKE_SOURCE_DIR}/ggml_kvtc/kvtc-rows.h" "${CMAKE_SOURCE_DIR}/ggml_kvtc/cpu/kvtc-cpu.h"
    COMPONENT wheel DESTINATION llama_cpp/include)
install(FILES "${CMAKE_SOURCE_DIR}/LICENSE" COMPONENT wheel DESTINATION llama_cpp RENAME LICENSE.kvtc)
